"""The overlay on the meta device against plain PEFT on real models."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from families import family_config, family_model
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from glasstune.adapters.inject import add_adapter
from glasstune.adapters.overlay import carries_adapter, existing_overlay, moment_bytes, overlay
from glasstune.adapters.saving import save_adapter
from glasstune.core.errors import InputError
from glasstune.models.int8 import convert_to_int8
from glasstune.models.quantization import adam_8bit

# One dense layer, one mixture with a shared expert.
DEEPSEEK = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip

# What PEFT's wrappers put between a base module's path and its own parameters.
_INNER = re.compile(
    r"\.(base_layer|original_module|token_adapter|modules_to_save\.default|lora_\w+(\.default)?"
    r"|trainable_tokens_delta(\.default)?|weight|bias)(?=\.|$)"
)


def on_meta(family: str, **overrides) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            family_config(family, **overrides), dtype=torch.bfloat16
        )


def by_path(model) -> dict[str, tuple[int, int]]:
    """Path in the base to (parameters, bytes) of all that needs a gradient, from names alone."""
    sums: dict[str, tuple[int, int]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            path = _INNER.sub("", name.removeprefix("base_model.model."))
            count, size = sums.get(path, (0, 0))
            sums[path] = (count + value.numel(), size + value.numel() * value.element_size())
    return sums


def real_line(model, capsys) -> str:
    capsys.readouterr()
    model.print_trainable_parameters()
    return capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of random models by family, each written once."""
    folders = {}

    def folder(family: str) -> str:
        if family not in folders:
            place = tmp_path_factory.mktemp(family)
            family_model(family).to(torch.bfloat16).save_pretrained(place)
            folders[family] = str(place)
        return folders[family]

    return folder


@pytest.mark.parametrize("precision", ["16", "int8", "w8a16", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_counts_are_those_of_plain_peft_on_a_real_load(saved, family, precision, capsys):
    asked = {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }.get(precision)
    quantization = {} if asked is None else {"quantization_config": asked, "device_map": "cpu"}
    real = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.bfloat16, **quantization)
    if precision == "w8a16":
        convert_to_int8(real, None)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    with warnings.catch_warnings():  # its pattern for a mixture's experts does match, a parameter
        warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        real = get_peft_model(real, config)
    laid = overlay(on_meta(family))
    assert laid.peft_line == real_line(real, capsys)
    assert (laid.trainable_parameters, laid.all_parameters) == real.get_nb_trainable_parameters()
    expected = by_path(real)
    assert {path: (row.parameters, row.weight_bytes) for path, row in laid.rows.items()} == expected
    assert laid.options["target_modules"] == "all-linear"


OPTIONS = [
    ("llama", {"use_dora": True}),
    ("llama", {"bias": "all"}),
    ("phi", {"bias": "all"}),
    ("phi", {"bias": "lora_only", "target_modules": ["q_proj"]}),
    ("phi", {"lora_bias": True, "target_modules": ["lm_head"]}),
    ("llama", {"init_lora_weights": "pissa"}),
    ("llama", {"init_lora_weights": "orthogonal", "r": 2}),
    ("llama", {"rank_pattern": {"q_proj": 1, "layers.0.*up_proj": 3}}),
    ("llama", {"alpha_pattern": {"q_proj": 9}}),
    ("llama", {"layers_to_transform": [1]}),
    ("llama", {"exclude_modules": ["k_proj"]}),
    ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    ("llama", {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
    ("llama", {"trainable_token_indices": [5, 6, 7]}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    ("llama", {"target_parameters": ["mlp.up_proj.weight"]}),
    ("llama", {"target_modules": r".*layers\.1\..*[qv]_proj"}),
    ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj"]}),
    ("gpt_oss", {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]}),
    ("mixtral", {"rank_pattern": {"q_proj": 2}}),
]  # fmt: skip


CASES = [(*case, False) for case in OPTIONS] + [
    (family, options, True) for family, options in OPTIONS if family == "llama"
]


@pytest.mark.parametrize(("family", "options", "tied"), CASES, ids=str)
def test_every_option_is_laid_over_its_base_module(family, options, tied):
    options = {"r": 4, "lora_alpha": 8, **options}
    config = family_config(family, tie_word_embeddings=tied)
    real = add_adapter(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), **options)
    laid = overlay(on_meta(family, tie_word_embeddings=tied), options)
    got = {path: (row.parameters, row.weight_bytes) for path, row in laid.rows.items()}
    assert got == by_path(real)
    assert (laid.trainable_parameters, laid.all_parameters) == real.get_nb_trainable_parameters()
    base = {path for path, _ in on_meta(family).named_modules()}
    assert set(laid.rows) <= base
    live = existing_overlay(real)
    assert live.rows == laid.rows
    assert live.peft_line == laid.peft_line
    assert live.trained == laid.trained


def test_a_hand_worked_example():
    laid = overlay(on_meta("llama"), {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]})
    row = laid.rows["model.layers.1.mlp.up_proj"]
    # A is 4 x 32, B 64 x 4: 384 float32 weights, as many gradients, two moments.
    assert (row.kind, row.r, row.lora_alpha) == ("lora", 4, 8.0)
    assert row.parameters == 4 * 32 + 64 * 4
    assert (row.weight_bytes, row.gradient_bytes, row.optimizer_bytes) == (1536, 1536, 3072)
    assert laid.trainable_parameters == 2 * 384
    assert laid.bytes == 2 * (1536 + 1536 + 3072)
    assert laid.trained == frozenset()
    assert laid.options == {
        "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["up_proj"],
    }  # fmt: skip


def test_kinds_and_ranks_are_named():
    rows = overlay(
        on_meta("phi"),
        {"r": 4, "use_dora": True, "bias": "lora_only", "target_modules": ["q_proj", "v_proj"],
         "rank_pattern": {"v_proj": 2}, "modules_to_save": ["lm_head"],
         "trainable_token_indices": [1]},
    ).rows  # fmt: skip
    assert rows["model.layers.0.self_attn.q_proj"].kind == "dora+bias"
    assert rows["model.layers.0.self_attn.q_proj"].r == 4
    assert rows["model.layers.0.self_attn.v_proj"].r == 2
    assert (rows["lm_head"].kind, rows["lm_head"].r) == ("modules_to_save", None)
    assert rows["model.embed_tokens"].kind == "trainable_tokens"


def test_trained_names_modules_whose_own_tensor_learns():
    laid = overlay(
        on_meta("phi"),
        {"bias": "lora_only", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    )
    assert laid.trained == {
        "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
    }  # fmt: skip


@pytest.mark.parametrize("count", [100, 4095, 4096, 4097, 70_000])
def test_8_bit_moments_are_those_of_bitsandbytes(count):
    value = nn.Parameter(torch.randn(count))
    optimizer = adam_8bit([value], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    value.grad = torch.randn(count)
    optimizer.step()
    state = optimizer.state[value]
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and not name.startswith("qmap")
    )
    assert moment_bytes(count, "adamw_8bit") == stored


def test_moments_are_those_of_torch():
    value = nn.Parameter(torch.randn(4097))
    optimizer = torch.optim.AdamW([value], fused=True)
    value.grad = torch.randn(4097)
    optimizer.step()
    state = optimizer.state[value]
    stored = sum(
        tensor.numel() * tensor.element_size() for name, tensor in state.items() if name != "step"
    )
    assert moment_bytes(4097, "adamw_torch") == stored


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"target_modules": ["q_proj", "w_pack"]}, "target_not_found", "'w_pack'"),
        ({"modules_to_save": ["head"]}, "module_not_found", "'head'"),
        ({"exclude_modules": ["k_projj"]}, "module_not_found", "'k_projj'"),
        ({"rank_pattern": {"w_pack": 4}}, "module_not_found", "'w_pack'"),
        ({"target_parameters": ["up_proj.weight", "x.y"], "target_modules": None},
         "module_not_found", "'x.y'"),
    ],
)  # fmt: skip
def test_an_entry_that_hits_nothing_is_a_finding_and_the_rest_is_laid(options, code, says):
    laid = overlay(on_meta("llama"), options)
    (finding,) = [item for item in laid.findings if item.severity == "error"]
    assert finding.code == code
    assert says in finding.message
    assert laid.trainable_parameters > 0


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["w_pack", "x"]},
        {"target_modules": []},
        {"target_modules": "q_proj"},
        {"target_modules": "("},
        {"lora_alfa": 3},
        {"r": 0},
        {"bias": "some"},
        {"init_lora_weights": "eva"},
    ],
)
def test_what_cannot_be_laid_at_all_is_the_users_error(options):
    with pytest.raises(InputError):
        overlay(on_meta("llama"), options)


def test_a_mixture_whose_experts_stay_is_said():
    (finding,) = overlay(on_meta("gpt_oss"), {"r": 4}).findings
    assert finding.code == "experts_not_adapted"
    assert "gate_up_proj, down_proj" in finding.message
    assert overlay(on_meta("llama"), {"r": 4}).findings == []


def test_a_rank_above_the_size_is_said():
    (finding,) = overlay(on_meta("llama"), {"r": 64, "target_modules": ["k_proj"]}).findings
    assert finding.code == "rank_above_size"
    # A 64 x 32 and B 16 x 64, for a weight of 16 x 32.
    assert "3,072 for 512" in finding.message


def test_a_saved_module_that_hits_more_is_said():
    options = {"r": 4, "target_modules": ["q_proj"]}
    laid = overlay(on_meta("llama"), {**options, "modules_to_save": ["norm"]})
    (finding,) = laid.findings
    assert finding.code == "saved_module_broad"
    assert "4 modules" in finding.message  # two norms in each of two layers
    for exact in (["model.norm"], ["mlp"], ["lm_head"]):
        assert overlay(on_meta("llama"), {**options, "modules_to_save": exact}).findings == []


def test_an_adapted_tied_head_is_said():
    tied = {"tie_word_embeddings": True}
    for target, name in (("lm_head", "head"), ("embed_tokens", "embedding")):
        laid = overlay(on_meta("llama", **tied), {"target_modules": [target]})
        (finding,) = laid.findings
        assert finding.code == "tied_weights_adapted"
        assert finding.fix.startswith(f"leave the {name} out")


@pytest.mark.parametrize("targets", ["all-linear", r".*\.\w+_proj(_with_mqa)?"])
def test_linear_layers_that_peft_drops_are_said(targets):
    """PEFT makes parameters of the names that a mixture's experts once had."""
    config = AutoConfig.for_model("deepseek_v3", **DEEPSEEK)
    real = AutoModelForCausalLM.from_config(config)
    linear = {path for path, part in real.named_modules() if type(part) is nn.Linear}
    plain = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(real, plain)
    left = linear - by_path(adapted).keys() - {"lm_head"}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    laid = overlay(empty, {"r": 4, "target_modules": targets})
    found = [found for found in laid.findings if found.code == "linear_not_adapted"]
    if not left:  # a PEFT that reaches them
        assert found == []
        return
    (finding,) = found
    assert finding.severity == "warning"
    # Three of the dense layer, three of the shared experts of the other.
    assert f"leaves {len(left)} linear layers alone" in finding.message
    # What it says to do works.
    names = finding.fix.partition("[")[2].removesuffix("]").split(", ")
    again = overlay(
        AutoModelForCausalLM.from_config(config),
        {"r": 4, "target_modules": targets, "target_parameters": names},
    )
    assert left <= again.rows.keys()
    assert "linear_not_adapted" not in {found.code for found in again.findings}


def test_any_module_takes_lora_by_name():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    laid = overlay(model, {"r": 2, "target_modules": ["0"]})
    assert {path: row.parameters for path, row in laid.rows.items()} == {"0": 2 * (8 + 6)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_modules": ["self_attn"]}, "Target module LlamaAttention is not supported"),
        ({"r": 10**30}, "Overflow when unpacking long"),
    ],
)
def test_what_peft_refuses_is_one_line(options, says):
    with pytest.raises(InputError) as caught:
        overlay(on_meta("llama"), options)
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert "frame #" not in caught.value.message


def test_options_of_the_user_are_left_alone():
    options = {"rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "none_such"]}
    overlay(on_meta("mixtral"), options)
    add_adapter(family_model("mixtral"), rank_pattern=options["rank_pattern"])
    assert options == {"rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "none_such"]}


def test_full_paths_of_a_saved_adapter_are_said_by_name():
    every = [
        path for path, module in on_meta("llama").named_modules()
        if path.endswith(("q_proj", "v_proj"))
    ]  # fmt: skip
    assert overlay(on_meta("llama"), {"target_modules": every}).options["target_modules"] == [
        "q_proj",
        "v_proj",
    ]
    some = overlay(on_meta("llama"), {"target_modules": every[1:]}).options["target_modules"]
    assert some == every[1:]


def test_an_adapter_inside_another_module_is_found():
    model = add_adapter(family_model("llama"), r=4, lora_alpha=8, target_modules=["q_proj"])
    outer = nn.ModuleDict({"inner": model})
    live = existing_overlay(outer)
    assert carries_adapter(outer)
    assert not carries_adapter(family_model("llama"))
    assert len(live.rows) == 2
    assert [path[-25:] for path in live.rows] == [
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
    ]
    assert live.options["r"] == 4
    assert live.peft_line == existing_overlay(model).peft_line


def test_a_trained_bias_is_counted_with_the_base():
    laid = overlay(on_meta("phi"), {"r": 4, "bias": "lora_only", "target_modules": ["q_proj"]})
    # Two layers: A 4 x 32 and B 32 x 4 add weights; both they and 32 biases add gradient, moments.
    assert laid.bytes == 2 * (256 * 4 + 288 * 4 + 288 * 8)


def test_targets_of_a_live_adapter_are_said_by_name():
    live = existing_overlay(add_adapter(family_model("llama"), r=4, modules_to_save=["lm_head"]))
    assert live.options["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


def test_a_frozen_adapter_has_no_gradients():
    model = add_adapter(family_model("llama"), r=4)
    model.requires_grad_(False)
    live = existing_overlay(model)
    assert live.trainable_parameters == 0
    assert live.peft_line.startswith("trainable params: 0 || all params: ")
    row = live.rows["model.layers.0.self_attn.q_proj"]
    assert (row.parameters, row.gradient_bytes, row.optimizer_bytes) == (256, 0, 0)


@pytest.mark.parametrize(
    ("config", "kind", "path"),
    [
        (IA3Config(task_type="CAUSAL_LM"), "ia3", "model.layers.0.self_attn.k_proj"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prompt_tuning", ""),
    ],
)
def test_other_kinds_of_adapter_are_read_too(config, kind, path):
    live = existing_overlay(get_peft_model(family_model("llama"), config))
    assert live.rows[path].kind == kind
    assert live.trainable_parameters == sum(row.parameters for row in live.rows.values()) > 0


def test_a_quantised_module_cannot_be_saved_whole(saved):
    real = AutoModelForCausalLM.from_pretrained(
        saved("llama"), quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    with pytest.raises(InputError) as caught:
        add_adapter(real, modules_to_save=["down_proj"], target_modules=["q_proj"])
    assert caught.value.code == "saved_module_quantized"


def test_a_saved_adapter_of_a_mixture_is_laid_as_it_was(tmp_path):
    from glasstune.adapters.overlay import saved_adapter_options

    real = add_adapter(family_model("mixtral"), r=4, lora_alpha=6, use_rslora=True)
    save_adapter(real, tmp_path, "base")
    options = saved_adapter_options(tmp_path)
    assert (options["r"], options["lora_alpha"], options["use_rslora"]) == (4, 6, True)
    laid = overlay(on_meta("mixtral"), options)
    assert {path: (r.parameters, r.weight_bytes) for path, r in laid.rows.items()} == by_path(real)
