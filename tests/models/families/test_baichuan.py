"""Baichuan against transformers' Llama (RoPE), a reference of a few lines (ALiBi), definitions."""

from __future__ import annotations

import json
import math
from typing import Any

import bitsandbytes
import pytest
import torch
from baichuan import baichuan_config, baichuan_model, save_baichuan
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from glasstune.adapters.inject import add_adapter, trainable
from glasstune.cli import main as cli
from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.kernels.int8_linear.reference import expand_rows, quantize_rows
from glasstune.models.facts import model_facts
from glasstune.models.families.baichuan import BaichuanConfig, BaichuanForCausalLM
from glasstune.models.families.baichuan.alibi import slopes
from glasstune.models.families.baichuan.head import fold, row_norms
from glasstune.models.head import fold_head, split_head
from glasstune.models.load import load_base
from glasstune.models.resolve import resolve_model

KINDS = ["rope", "alibi"]


def ids(rows: int = 2, length: int = 17, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 640, (rows, length), generator=generator)


def weigh(logits: Tensor) -> Tensor:
    """A loss that weighs every logit differently."""
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def as_llama(model: Any) -> Any:
    """The same weights in transformers' Llama: W_pack cut in three, unit rows in the head."""
    config = model.config
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size, num_attention_heads=4,
            num_hidden_layers=config.num_hidden_layers, rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=4096, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        if "W_pack" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("W_pack", f"{letter}_proj")] = part.clone()
        elif name == "lm_head.weight" and config.normalize_head:
            state[name] = value / value.norm(dim=1, keepdim=True)
        else:
            state[name] = value.clone()
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("second", [True, False], ids=["baichuan2", "baichuan"])
def test_rope_is_llama_with_one_product_for_three(second):
    model = baichuan_model(z_loss_weight=0 if second else None)
    assert model.config.normalize_head is second
    llama = as_llama(model)
    mine, theirs = model(input_ids=ids()).logits, llama(input_ids=ids()).logits
    scale = float(theirs.detach().abs().max())
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * scale)
    weigh(mine).backward()
    weigh(theirs).backward()
    wanted = dict(llama.named_parameters())
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and second:
            continue  # Llama's own head is the unit one: judged by its definition below
        right = (
            torch.cat([wanted[name.replace("W_pack", f"{x}_proj")].grad for x in "qkv"])
            if "W_pack" in name
            else wanted[name].grad
        )
        size = float(right.abs().max())
        assert size > 0
        torch.testing.assert_close(parameter.grad, right, rtol=1e-4, atol=2e-5 * size)


# The reference of ALiBi: everything said again with torch's plainest operations.
def papers_slopes(heads: int) -> list[float]:
    """The geometric series of the paper, and what its authors do for other numbers."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (k + 1) / power) for k in range(power)]
    between = [2 ** (-8 * (k + 1) / (2 * power)) for k in range(2 * power)][::2]
    return first + between[: heads - power]


def test_slopes_are_the_papers():
    for heads in (1, 2, 6, 8, 12, 32, 40, 64):
        right = torch.tensor(papers_slopes(heads))
        torch.testing.assert_close(slopes(heads, "cpu"), right, rtol=1e-6, atol=0.0)
    # 13B: 40 heads are 32 of one series and 8 between them, from the steepest.
    assert slopes(40, "cpu")[[0, 31, 32, 39]].tolist() == pytest.approx(
        [2**-0.25, 2**-8, 2**-0.125, 2**-1.875]
    )


def reference(model: Any, tokens_L: Tensor) -> Tensor:
    """Logits of one row, head by head and query by query."""
    weight = dict(model.named_parameters())
    heads, eps = model.config.num_attention_heads, model.config.rms_norm_eps

    def norm(x: Tensor, name: str) -> Tensor:
        return weight[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    x_Ld = weight["model.embed_tokens.weight"][tokens_L]
    for layer in range(model.config.num_hidden_layers):
        at = f"model.layers.{layer}"
        q_LHD, k_LHD, v_LHD = (
            (norm(x_Ld, f"{at}.input_layernorm") @ part.T).view(len(tokens_L), heads, -1)
            for part in weight[f"{at}.self_attn.W_pack.weight"].chunk(3)
        )
        rows = []
        for query in range(len(tokens_L)):
            each = []
            for head, slope in enumerate(papers_slopes(heads)):
                keys = k_LHD[: query + 1, head]
                away = torch.arange(query + 1) - query
                scores = keys @ q_LHD[query, head] / keys.shape[1] ** 0.5 + slope * away
                each.append(scores.softmax(0) @ v_LHD[: query + 1, head])
            rows.append(torch.cat(each))
        x_Ld = x_Ld + torch.stack(rows) @ weight[f"{at}.self_attn.o_proj.weight"].T
        h_Ld = norm(x_Ld, f"{at}.post_attention_layernorm")
        gate, up, down = (weight[f"{at}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        x_Ld = x_Ld + (functional.silu(h_Ld @ gate.T) * (h_Ld @ up.T)) @ down.T
    head_Vd = weight["lm_head.weight"]
    return norm(x_Ld, "model.norm") @ (head_Vd / head_Vd.norm(dim=1, keepdim=True)).T


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_alibi_is_the_reference(attention):
    model = baichuan_model("alibi")
    model.set_attn_implementation(attention)
    tokens = ids(1, 13)
    mine = model(input_ids=tokens).logits[0]
    weigh(mine).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    right = reference(model, tokens[0])
    torch.testing.assert_close(
        mine, right, rtol=1e-5, atol=1e-5 * float(right.detach().abs().max())
    )
    weigh(right).backward()
    for name, parameter in model.named_parameters():
        size = float(parameter.grad.abs().max())
        assert size > 0
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=2e-5 * size)


def test_an_attention_without_a_bias_is_refused_with_alibi():
    model = baichuan_model("alibi")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no ALiBi"):
        model(input_ids=ids())


# Padding, cache, packing.
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padded_rows_are_the_rows_alone(kind):
    model = baichuan_model(kind)
    short, long = ids(1, 9, seed=1), ids(1, 14, seed=2)
    alone = model(input_ids=short).logits[0]
    pad = torch.zeros(1, 5, dtype=torch.long)
    for side in ("left", "right"):
        parts = [pad, short] if side == "left" else [short, pad]
        batch = torch.cat([torch.cat(parts, dim=1), long])
        mask = torch.cat([(torch.cat(parts, dim=1) > 0).long(), torch.ones_like(long)])
        places = (mask.cumsum(1) - 1).clamp_min(0)
        out = model(input_ids=batch, attention_mask=mask, position_ids=places).logits
        torch.testing.assert_close(out[0][mask[0].bool()], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[1], model(input_ids=long).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation_with_a_cache_is_that_without(kind):
    model = baichuan_model(kind)
    batch = ids(2, 9)
    mask = torch.ones_like(batch)
    batch[0, :4], mask[0, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False,
               "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    with_cache = model.generate(batch, use_cache=True, **options)
    assert with_cache.shape == (2, 21)
    assert torch.equal(with_cache, model.generate(batch, use_cache=False, **options))
    # Against a loop that asks for one token at a time, of the row alone.
    row = batch[:1, 4:]
    for _ in range(12):
        row = torch.cat([row, model(input_ids=row).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(with_cache[0, 4:], row[0])
    assert len(with_cache[:, 9:].unique()) > 6


# The head.
@torch.no_grad()
def test_a_frozen_head_is_scaled_once():
    model = baichuan_model().requires_grad_(False)
    before = model.lm_head.weight.clone()
    lengths = before.norm(dim=1)
    assert float(lengths.max() / lengths.min()) > 5  # else nothing is tested
    right = model.model(input_ids=ids())[0] @ (before / lengths[:, None]).T
    split = split_head(model)
    assert split.proven
    assert not split.bare
    torch.testing.assert_close(split.logits(split.hidden(model, input_ids=ids())), right)
    choices = Choices()
    assert fold_head(model, choices)
    assert [choice.value for choice in choices] == [True]
    assert split.bare
    torch.testing.assert_close(model.lm_head.weight, before / lengths[:, None])
    torch.testing.assert_close(model(input_ids=ids()).logits, right)
    folded = model.lm_head.weight.clone()
    assert fold_head(model)
    assert torch.equal(model.lm_head.weight, folded)  # once
    # Weights that are loaded later are scaled again: the head is not taken for folded.
    model.lm_head.weight.copy_(before)
    assert not split.bare
    torch.testing.assert_close(model(input_ids=ids()).logits, right)


def test_a_head_of_the_first_generation_is_left_alone():
    model = baichuan_model(z_loss_weight=None).requires_grad_(False)
    before = model.lm_head.weight.clone()
    assert split_head(model).bare
    assert fold_head(model)
    assert torch.equal(model.lm_head.weight, before)


def test_a_trained_head_learns_through_its_lengths():
    model = add_adapter(baichuan_model().requires_grad_(False), target_modules=["W_pack"],
                        modules_to_save=["lm_head"], r=2)  # fmt: skip
    assert not fold_head(model)
    trained = trainable(model)["base_model.model.lm_head.modules_to_save.default.weight"]
    split = split_head(model)
    hidden = split.hidden(model, input_ids=ids()).detach()
    weigh(split.logits(hidden)).backward()
    right = trained.detach().clone().requires_grad_()
    weigh(hidden @ (right / right.norm(dim=1, keepdim=True)).T).backward()
    size = float(right.grad.abs().max())
    torch.testing.assert_close(trained.grad, right.grad, rtol=1e-4, atol=1e-5 * size)


def test_lora_on_the_head_is_what_a_merge_writes():
    """Rows of W + s B A have length one: the logits of the merged model, and their gradients."""
    model = add_adapter(baichuan_model().requires_grad_(False), target_modules=["lm_head"], r=3,
                        lora_alpha=6)  # fmt: skip
    assert not fold_head(model)
    lora = trainable(model)
    down, up = (lora[f"base_model.model.lm_head.lora_{x}.default.weight"] for x in "AB")
    with torch.no_grad():
        up.normal_(std=2.0)
    split = split_head(model)
    hidden = split.hidden(model, input_ids=ids()).detach()
    logits = split.logits(hidden)
    found = torch.autograd.grad(weigh(logits), [down, up])
    weight = model.get_base_model().lm_head.base_layer.weight.detach()
    merged = weight + 2 * up @ down
    unit = merged / merged.norm(dim=1, keepdim=True)
    assert ((unit - weight / weight.norm(dim=1, keepdim=True)).abs() > 0.05).any()
    torch.testing.assert_close(logits, hidden @ unit.T, rtol=1e-4, atol=1e-4)
    for one, other in zip(
        found, torch.autograd.grad(weigh(hidden @ unit.T), [down, up]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    with torch.no_grad(), model.disable_adapter():
        plain = hidden @ (weight / weight.norm(dim=1, keepdim=True)).T
        torch.testing.assert_close(split.logits(hidden), plain, rtol=1e-4, atol=1e-4)
    merged_model = model.merge_and_unload()
    torch.testing.assert_close(row_norms(merged_model.lm_head), merged.norm(dim=1))


def test_what_a_merge_could_not_write_is_refused():
    with pytest.raises(InputError, match="not plain LoRA"):
        add_adapter(baichuan_model(), target_modules=["lm_head"], r=2, use_dora=True)(
            input_ids=ids()
        )
    model = baichuan_model().requires_grad_(False)
    assert fold(model.lm_head)
    with pytest.raises(InputError, match="before the adapter was added"):
        add_adapter(model, target_modules=["lm_head"], r=2)(input_ids=ids())


@torch.no_grad()
def test_labels_give_the_loss_of_the_scaled_logits():
    model = baichuan_model()
    out = model(input_ids=ids(), labels=ids())
    right = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    torch.testing.assert_close(out.loss, right)
    loss, logits = model(input_ids=ids(), labels=ids(), return_dict=False, use_cache=False)
    torch.testing.assert_close(loss, right)
    assert torch.equal(logits, out.logits)


# Checkpoints as people have them.
def load(folder: Any, **options: Any) -> Any:
    config = ModelConfig(path=str(folder), **{"device": "cpu", "dtype": "float32", **options})
    trust = config.trust_remote_code
    resolved = resolve_model(str(folder), trust_remote_code=trust)
    return load_base(config, resolved, choices=Choices())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_checkpoints_load_and_come_back(kind, tmp_path):
    """Their code raises when it is run, also where it is trusted."""
    right = baichuan_model(kind)(input_ids=ids()).logits
    for weights in ("bin", "safetensors"):
        folder = save_baichuan(tmp_path / weights, kind, weights=weights, dtype="float32")
        for trust in (False, True):
            model = load(folder, trust_remote_code=trust)
            assert type(model) is BaichuanForCausalLM
            assert torch.equal(model(input_ids=ids()).logits, right)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is BaichuanForCausalLM
    assert torch.equal(again(input_ids=ids()).logits, right)
    content = json.loads((tmp_path / "again/config.json").read_text())
    assert content["model_type"] == "baichuan"
    assert content["alibi"] is (kind == "alibi")
    assert content["normalize_head"] is True
    assert not [key for key in content if key.startswith("_")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ({"bits": 8}, "Int8Linear"),
        ({"bits": 8, "int8_compute": "llm_int8"}, "Linear8bitLt"),
        ({"bits": 4}, "Linear4bit"),
    ],
    ids=["w8a16", "llm_int8", "nf4"],
)
@torch.no_grad()
def test_eight_and_four_bits_leave_the_head(kind, options, layer, tmp_path):
    """Logits are those of a plain model with the weights that the packed ones stand for."""
    folder = save_baichuan(tmp_path, kind, dtype="float32")
    model = load(folder, **options)
    kinds = {name: type(part).__name__ for name, part in model.named_modules()}
    small = {name for name, found in kinds.items() if found == layer}
    parts = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
             "mlp.down_proj")  # fmt: skip
    assert small == {f"model.layers.{number}.{part}" for number in (0, 1) for part in parts}
    assert type(model.lm_head) is nn.Linear
    plain = baichuan_model(kind)
    for name in small:
        weight, packed = plain.get_submodule(name).weight, model.get_submodule(name).weight
        if layer == "Linear4bit":
            weight.copy_(bitsandbytes.functional.dequantize_4bit(packed, packed.quant_state))
        else:
            weight.copy_(expand_rows(*quantize_rows(weight), torch.float32))
    right = plain(input_ids=ids()).logits
    error = float((model(input_ids=ids()).logits - right).norm() / right.norm())
    # LLM.int8 rounds its inputs to 8 bit too.
    assert error < (0.1 if layer == "Linear8bitLt" else 1e-4)


# Which of the four a config describes.
PUBLISHED = {
    "Baichuan-7B": ({"vocab_size": 64000, "hidden_size": 4096, "max_position_embeddings": 4096,
                     "num_attention_heads": 32}, "rope", "plain"),
    "Baichuan-13B": ({"vocab_size": 64000, "hidden_size": 5120, "model_max_length": 4096,
                      "num_attention_heads": 40}, "alibi", "plain"),
    "Baichuan2-7B": ({"vocab_size": 125696, "hidden_size": 4096, "max_position_embeddings": 4096,
                      "model_max_length": 4096, "num_attention_heads": 32, "z_loss_weight": 0},
                     "rope", "normalised"),
    "Baichuan2-13B": ({"vocab_size": 125696, "hidden_size": 5120, "model_max_length": 4096,
                       "num_attention_heads": 40, "z_loss_weight": 0}, "alibi", "normalised"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_four_published_models(name):
    keys, positions, head = PUBLISHED[name]
    config = BaichuanConfig(**keys)
    assert [choice.value for choice in config.native_choices()] == [positions, head]
    assert all(choice.reason for choice in config.native_choices())
    facts = model_facts(config)
    assert facts.max_positions == (None if positions == "alibi" else 4096)
    assert facts.can_pack
    # Its own key decides; what was saved says the same again, whatever its sizes are.
    other = BaichuanConfig(**keys, alibi=positions == "rope", normalize_head=head == "plain")
    assert other.alibi is (positions == "rope")
    again = BaichuanConfig.from_dict({**other.to_dict(), "hidden_size": 640})
    assert (again.alibi, again.normalize_head) == (other.alibi, other.normalize_head)


def test_a_run_says_what_was_read_from_the_config(tmp_path):
    choices = Choices()
    resolve_model(
        str(save_baichuan(tmp_path, "alibi", weights="none", z_loss_weight=0.1)), choices=choices
    )
    said = {choice.name: choice for choice in choices}
    assert said["model.code"].value == "glasstune"
    assert said["model.positions"].value == "alibi"
    assert "model_max_length without" in said["model.positions"].reason
    assert said["model.head"].value == "normalised"
    assert any("z_loss_weight 0.1" in text for text in choices.warnings())


def test_one_product_makes_all_three():
    config = BaichuanConfig.from_dict(baichuan_config(num_key_value_heads=2))
    assert config.num_key_value_heads == config.num_attention_heads == 4


# Layers, width, inner width, heads, parameters of the model and of LoRA with r=1 on W_pack.
SIZES = {
    "rope": (32, 4096, 11008, 32, 7_505_973_248, 524_288),
    "alibi": (40, 5120, 13696, 40, 13_896_668_160, 819_200),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_inspected_without_its_code(kind, tmp_path, capsys):
    """The published sizes, from a folder as people have it; nothing of 28 GB is made."""
    layers, width, inner, heads, size, lora = SIZES[kind]
    folder = save_baichuan(
        tmp_path, kind, weights="none", hidden_size=width, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, vocab_size=125_696,
    )  # fmt: skip
    words = ["inspect", str(folder), "--target-modules", "W_pack", "--r", "1", "--json", "-"]
    assert cli.run(words) == 0
    out, tree = capsys.readouterr()
    assert f"trainable params: {lora:,} || all params: {size + lora:,}" in tree
    assert f"(0-{layers - 1}): {layers} x BaichuanDecoderLayer" in tree
    assert f"(W_pack): Linear({width}, {3 * width}) + LoRA(r=1)" in tree
    record = json.loads(out)
    rows = {row["path"]: row for row in record["precisions"]["4"]["modules"]}
    assert rows["model.layers.0.self_attn.W_pack"]["class"] == "Linear4bit"
    assert rows["lm_head"]["class"] == "Linear"
    said = [note["message"] for note in record["findings"] if note["code"] == "native_family"]
    assert len(said) == 3
    assert any(f"positions: {kind} (hidden size {width} is" in text for text in said)
    assert any("head: normalised (125,696 entries" in text for text in said)
