"""What is trained, in which type, and what the base alone computes."""

from __future__ import annotations

import copy

import pytest
import torch
from families import family_model
from torch import nn

from glasstune.adapters.base import base_only
from glasstune.adapters.inject import (
    adapter_fingerprint,
    add_adapter,
    keep_activation_dtype,
    trainable,
)
from glasstune.core.errors import InputError, RunError
from glasstune.models.int8 import convert_to_int8

IDS = torch.arange(3, 21).reshape(2, 9)

ADAPTERS = {
    "lora": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}


def shaken(model, std: float = 0.1):
    """Moves every trained tensor away from where it started."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_g03_the_start_is_the_base_and_a_learns_after_b(options):
    base = family_model("llama")
    truth = base(input_ids=IDS).logits
    torch.manual_seed(0)
    model = add_adapter(base, r=4, **options)
    if "use_dora" in options:  # its norm is computed, not stored
        torch.testing.assert_close(model(input_ids=IDS).logits, truth, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(model(input_ids=IDS).logits, truth)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)

    def gradients() -> tuple[list[bool], list[bool]]:
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        named = trainable(model)
        # LoRA on an embedding is made the other way round: there A starts at zero.
        zero_first = [n for n in named if "lora_A" in n or "embedding_B" in n]
        first = [n for n in named if "lora_B" in n or "embedding_A" in n]
        return (
            [bool(named[n].grad.any()) for n in zero_first],
            [bool(named[n].grad.any()) for n in first],
        )

    late, early = gradients()
    assert early
    assert all(early)
    assert not any(late)
    optimizer.step()
    late, early = gradients()
    assert all(late)
    assert all(early)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_p01_p03_everything_trained_is_float32_over_a_16_bit_base(options, dtype):
    model = add_adapter(family_model("llama").to(dtype), r=4, **options)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {dtype}
    # It runs with and without autocast, and hands the base's type on.
    assert model(input_ids=IDS).logits.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for p in trainable(model).values()]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in gradients)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_p03_trained_biases_are_float32_too(family, bias):
    base = family_model(family).bfloat16()
    torch.manual_seed(0)
    for name, value in base.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero: a lost one would not show
            value.data.normal_(std=0.5)
    eager = base(input_ids=IDS).logits.float()
    truth = copy.deepcopy(base).float()(input_ids=IDS).logits
    model = add_adapter(base, r=4, bias=bias)
    biases = {name: p for name, p in trainable(model).items() if "bias" in name}
    assert biases
    assert {p.dtype for p in biases.values()} == {torch.float32}
    # The bias is now added after the product is rounded: one more rounding, no other change. So
    # the distance to the fp32 truth stays within twice the plain bfloat16 model's own.
    ours = model(input_ids=IDS).logits.float()
    assert (ours - truth).norm() <= 2 * (eager - truth).norm()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in biases.values())


def test_p03_small_updates_are_not_lost():
    model = add_adapter(family_model("llama").bfloat16(), r=4, target_modules=["q_proj"])
    values = trainable(model)
    before = {name: p.detach().clone() for name, p in values.items()}
    optimizer = torch.optim.AdamW(values.values(), lr=2.5e-5, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    moved = torch.cat([(p != before[name]).flatten() for name, p in values.items()])
    assert float(moved.float().mean()) > 0.99
    half = [before[n].bfloat16() == p.detach().bfloat16() for n, p in values.items() if "_A" in n]
    assert float(torch.cat([h.flatten() for h in half]).float().mean()) > 0.3  # bf16 would not see


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_the_base_alone_is_exact(options, dtype):
    base = family_model("llama").to(dtype)
    truth = base(input_ids=IDS).logits
    model = shaken(add_adapter(base, r=4, **options))
    needs = [p.requires_grad for p in model.parameters()]
    adapted = model(input_ids=IDS).logits.detach()
    assert float((adapted - truth).float().abs().max()) > 0.01
    with base_only(model):
        assert torch.equal(model(input_ids=IDS).logits, truth)
        assert [p.requires_grad for p in model.parameters()] == needs
    assert torch.equal(model(input_ids=IDS).logits, adapted)
    with pytest.raises(ZeroDivisionError), base_only(model):
        raise ZeroDivisionError
    assert torch.equal(model(input_ids=IDS).logits, adapted)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_base_alone_has_its_own_biases(family, bias):
    base = family_model(family)
    truth = base(input_ids=IDS).logits
    model = shaken(add_adapter(base, r=4, bias=bias))
    values = {name: p.detach().clone() for name, p in trainable(model).items()}
    with base_only(model):
        # A bias added apart is one other order of two additions.
        assert torch.equal(model(input_ids=IDS).logits, truth)
    assert all(torch.equal(p, values[name]) for name, p in trainable(model).items())


def test_the_base_alone_at_8_bit():
    base = family_model("llama")
    convert_to_int8(base, None)
    truth = base(input_ids=IDS).logits
    model = shaken(add_adapter(base, r=4))
    with base_only(model):
        assert torch.equal(model(input_ids=IDS).logits, truth)


def test_a_base_that_was_changed_is_not_called_the_base():
    model = add_adapter(family_model("llama"), r=4, init_lora_weights="pissa")
    with pytest.raises(InputError, match="pissa"), base_only(model):
        pass


def test_a_plain_model_is_its_own_base():
    model = family_model("llama")
    with base_only(model):
        model(input_ids=IDS)


def test_nothing_to_train_is_an_error():
    with pytest.raises(RunError, match="no parameter"):
        trainable(family_model("llama"))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_activations_that_stay_16_bit_give_the_same_gradients(options, bits):
    def gradients(keep: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        base = family_model("llama").bfloat16().to(dtype)
        if bits == 8:
            convert_to_int8(base, None)
        torch.manual_seed(0)
        model = shaken(add_adapter(base, r=4, **options))
        if keep:
            assert keep_activation_dtype(model) > 0
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in trainable(model).items()}

    cast, kept = gradients(False), gradients(True)
    if "use_dora" not in options:
        assert all(torch.equal(kept[name], grad) for name, grad in cast.items())
        return
    # DoRA makes its norm in the activation's type: as near to the truth as the copies are.
    truth = gradients(False, torch.float32)

    def far(values: dict[str, torch.Tensor]) -> float:
        errors = [(values[name] - true).norm() ** 2 for name, true in truth.items()]
        return float(sum(errors).sqrt())

    assert 0 < far(kept) <= 2 * far(cast)


def test_t07_trained_tokens_move_and_no_others():
    base = family_model("llama", tie_word_embeddings=True)
    before = base.get_input_embeddings().weight.detach().clone()
    model = add_adapter(base, r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6])
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    merged = model.merge_and_unload().get_input_embeddings().weight
    moved = (merged != before).any(-1).nonzero().flatten().tolist()
    assert moved == [5, 6]


def test_fingerprint_sees_options_and_shapes():
    def of(**options) -> str:
        return adapter_fingerprint(add_adapter(family_model("llama"), **options))

    assert of(r=4) == of(r=4)
    assert of(r=4) != of(r=8)
    assert of(r=4) != of(r=4, lora_alpha=16)
    assert of(r=4) != of(r=4, target_modules=["q_proj"])
