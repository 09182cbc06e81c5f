"""LoRA options: names, targets, families, what PEFT would have dropped in silence."""

from __future__ import annotations

import pytest
import torch
from families import family_model
from peft.tuners.lora import LoraLayer

from glasstune.adapters.inject import adapter_findings, add_adapter, trainable
from glasstune.adapters.options import build_lora_config, lora_option_names
from glasstune.core.errors import InputError

IDS = torch.arange(3, 21).reshape(2, 9)


def adapted_names(model) -> set[str]:
    return {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def test_m01_names_of_another_family_list_what_exists():
    with pytest.raises(InputError) as caught:
        add_adapter(family_model("bloom"), target_modules=["q_proj", "v_proj"])
    error = caught.value
    assert error.code == "target_not_found"
    assert error.where == "adapter.target_modules"
    assert "'q_proj', 'v_proj'" in error.message
    for name in ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"):
        assert name in error.message


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ([], "empty"),
        (["q_proj", "w_pack"], "'w_pack'"),  # PEFT trains q_proj and drops the other
        (["qproj"], "did you mean q_proj"),
        ("q_proj", "whole module path"),  # a string is a regular expression of the whole path
        ("model.layers.9.*", "matches no"),
    ],
)
def test_m01_a_target_that_hits_nothing_is_an_error(target, says):
    with pytest.raises(InputError) as caught:
        add_adapter(family_model("llama"), target_modules=target)
    assert says in str(caught.value)
    assert "Linear modules of this model: q_proj, k_proj" in str(caught.value)


def test_a_broken_expression_is_named():
    with pytest.raises(InputError, match="no regular expression"):
        add_adapter(family_model("llama"), target_modules="(")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modules_to_save": ["head"]}, "'head'"),
        ({"exclude_modules": ["k_projj"]}, "did you mean k_proj"),
        ({"rank_pattern": {"w_pack": 4}}, "w_pack"),
        ({"alpha_pattern": {"w_pack": 4}}, "w_pack"),
    ],
)
def test_m01_other_lists_must_hit_too(options, says):
    with pytest.raises(InputError, match=r"match(es)? no") as caught:
        add_adapter(family_model("llama"), **options)
    assert says in str(caught.value)


def test_m01_defaults_come_from_the_architecture():
    expected = {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        "gpt2": {"c_attn", "c_proj", "c_fc"},
    }
    for family, names in expected.items():
        assert adapted_names(add_adapter(family_model(family), r=2)) == names


@pytest.mark.parametrize("target", ["all-linear", ["c_attn"], ["c_attn", "c_proj", "c_fc"]])
def test_m02_conv1d_of_gpt2_is_found_and_merges(target):
    model = family_model("gpt2")
    adapted = add_adapter(model, r=4, target_modules=target)
    if target == "all-linear":
        assert adapted_names(adapted) == {"c_attn", "c_proj", "c_fc"}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(adapted).values():
            parameter.normal_(std=0.1)
    adapted.eval()
    before = adapted(input_ids=IDS).logits
    merged = adapted.merge_and_unload()
    after = merged(input_ids=IDS).logits
    assert (before - family_model("gpt2")(input_ids=IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(InputError) as caught:
        add_adapter(family_model("llama"), lora_alfa=16)
    assert caught.value.code == "unknown_key"
    assert caught.value.where == "adapter.lora_alfa"
    assert "lora_alpha" in caught.value.fix


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"bias": "some"}, {"init_lora_weights": "magic"}, {"layers_pattern": "h"}]
)
def test_a_value_that_peft_refuses_is_the_users_error(options):
    with pytest.raises(InputError) as caught:
        add_adapter(family_model("llama"), **options)
    assert caught.value.code in ("bad_value", "adapter_refused")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_dropout": 0.1},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"lora_bias": True, "target_modules": ["lm_head"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal", "r": 2},
        {"init_lora_weights": False},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 9}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": ["k_proj"]},
        {"modules_to_save": ["lm_head", "norm"]},
        {"trainable_token_indices": [5, 6]},
        {"target_parameters": ["mlp.up_proj.weight"], "target_modules": []},
        {"target_modules": r".*\.[qv]_proj"},
        {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    ],
    ids=str,
)
def test_every_option_trains(options):
    model = family_model("phi" if options.get("lora_bias") else "llama")
    if "target_parameters" in options:
        options = {"target_parameters": options["target_parameters"]}
    torch.manual_seed(0)
    adapted = add_adapter(model, **{"r": 4, **options})
    adapted.train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in trainable(adapted).items()}
    assert all(grad is not None for grad in gradients.values())
    assert any(grad.any() for grad in gradients.values())


def test_rslora_and_patterns_set_the_scale():
    plain = add_adapter(family_model("llama"), r=16, lora_alpha=16, target_modules=["q_proj"])
    stable = add_adapter(
        family_model("llama"), r=16, lora_alpha=16, use_rslora=True, target_modules=["q_proj"]
    )
    layers = [
        next(m for m in model.modules() if isinstance(m, LoraLayer)) for model in (plain, stable)
    ]
    assert [layer.scaling["default"] for layer in layers] == [1.0, 4.0]


def test_every_field_of_lora_config_is_a_known_name():
    names = lora_option_names()
    assert {"r", "use_dora", "rank_pattern", "trainable_token_indices", "lora_bias"} <= set(names)
    config = build_lora_config({"task_type": "CAUSAL_LM"}, family_model("llama"))
    assert config.target_modules == "all-linear"


def test_a_tied_head_that_is_adapted_is_a_finding():
    tied = add_adapter(
        family_model("llama", tie_word_embeddings=True), target_modules=["q_proj", "lm_head"]
    )
    (finding,) = adapter_findings(tied)
    assert finding.code == "tied_weights_adapted"
    untied = add_adapter(family_model("llama"), target_modules=["q_proj", "lm_head"])
    assert adapter_findings(untied) == []
    assert adapter_findings(add_adapter(family_model("llama", tie_word_embeddings=True))) == []


def test_a_lone_name_is_shown_as_a_list():
    with pytest.raises(InputError) as caught:
        add_adapter(family_model("llama"), target_modules="q_proj")
    assert "[q_proj]" in caught.value.fix


def test_what_peft_refuses_names_the_modules_of_the_untouched_model():
    with pytest.raises(InputError) as caught:
        add_adapter(family_model("llama"), bias="some")
    assert "q_proj" in caught.value.fix
    assert "base_layer" not in caught.value.fix
