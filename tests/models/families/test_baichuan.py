"""Baichuan against transformers' Llama (RoPE), a reference of a few lines (ALiBi), definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from baichuan import baichuan_model
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from glasstune.adapters.inject import add_adapter, trainable
from glasstune.core.choices import Choices
from glasstune.core.errors import InputError
from glasstune.models.families.baichuan.alibi import slopes
from glasstune.models.families.baichuan.head import fold, row_norms
from glasstune.models.head import fold_head, split_head

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


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_one_by_one_with_a_cache_are_the_row_at_once(kind):
    """No padding, so no mask: the place of a token is known from the cache alone."""
    model = baichuan_model(kind)
    row = ids(1, 12)
    whole = model(input_ids=row).logits[0]
    first = model(input_ids=row[:, :5], use_cache=True)
    cache = first.get("cache", first.get("past_key_values"))
    name = "cache" if "cache" in first else "past_key_values"
    found = [first.logits[0]]
    for start, end in ((5, 6), (6, 9), (9, 10), (10, 12)):
        part = model(input_ids=row[:, start:end], use_cache=True, **{name: cache})
        found.append(part.logits[0])
    # float32 sums in another order; a token at a wrong place is off by whole logits.
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-4, atol=1e-4)


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
