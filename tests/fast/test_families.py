"""Whole-model gradients of every family, sped up, against PEFT's own forward."""

from __future__ import annotations

import pytest
import torch
from families import SPECS
from speeding import (
    IDS,
    adapted,
    distance,
    family_model,
    furthest,
    gradients,
    quantize,
    tiny,
    wide_enough,
    widened,
)

from glasstune.adapters.inject import keep_activation_dtype
from glasstune.fast.speed_up import speed_up

EXPERTS = ("mixtral", "qwen3_moe")  # their experts are bare parameters
ROUTED = (*EXPERTS, "gpt_oss")
FIRST = ("llama", "bloom", "qwen2", "gpt2", "gemma3_text", "phi3", "mixtral")
EVERY = [
    family if family in FIRST
    else pytest.param(family, marks=pytest.mark.slow(reason="23 more families at three precisions"))
    for family in SPECS
]  # fmt: skip


@pytest.mark.parametrize("family", SPECS)
def test_the_mathematics_is_the_same(family) -> None:
    """In float64, where nothing but the order of sums can differ."""
    model = tiny(family).double()
    if family in ROUTED:
        model.get_base_model().set_experts_implementation("eager")  # the default has no float64
    plain = gradients(model)
    report = speed_up(model)
    expected = {"wide", "plain"} if family in EXPERTS else {"wide"}
    assert {module.way for module in report.record.modules} == expected, str(report)
    assert furthest(gradients(model), plain) < 1e-12
    report.undo()
    assert furthest(gradients(model), plain) == 0


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "qwen2", "gemma3_text"])
def test_float32_is_exact(family) -> None:
    model = tiny(family)
    plain = gradients(model)
    speed_up(model)
    assert furthest(gradients(model), plain) < 1e-5


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_16_bit_products_are_as_near_to_the_truth_as_pefts(family, bits) -> None:
    """As training runs: under autocast, no fp32 copies of activations."""
    base = family_model(family, **wide_enough(family)).to(torch.bfloat16)
    quantize(base, bits)
    exact = adapted(widened(base))
    model = adapted(base)
    keep_activation_dtype(model)
    # Rounding sends a token to another expert now and then: more tokens, so that chance evens out.
    batches = [(IDS + 11 * number) % 96 for number in range(4 if family in ROUTED else 1)]
    truth = [gradients(exact, ids=ids) for ids in batches]
    eager = [gradients(model, autocast=True, ids=ids) for ids in batches]
    speed_up(model)
    ours = [gradients(model, autocast=True, ids=ids) for ids in batches]
    mine, theirs = (
        sum(distance(some, right) for some, right in zip(found, truth, strict=True))
        for found in (ours, eager)
    )
    assert mine <= 2 * theirs


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_wrong_gradient_is_seen(bits, monkeypatch) -> None:
    """The test above fails where A's gradients are 20 % off."""
    from glasstune.kernels.lora_group import fused

    base = family_model("llama", **wide_enough("llama")).to(torch.bfloat16)
    quantize(base, bits)
    truth = gradients(adapted(widened(base)))
    model = adapted(base)
    keep_activation_dtype(model)
    theirs = distance(gradients(model, autocast=True), truth)
    speed_up(model)
    right = fused.adapter_gradients

    def scaled(*args):
        return [grad * 1.2 if index % 2 == 0 else grad for index, grad in enumerate(right(*args))]

    monkeypatch.setattr(fused, "adapter_gradients", scaled)
    assert distance(gradients(model, autocast=True), truth) > 2 * theirs


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_without_autocast(bits) -> None:
    """Plain PEFT without autocast: its adapters multiply in float32, ours in the base's type."""
    base = family_model("llama", **wide_enough("llama")).to(torch.bfloat16)
    quantize(base, bits)
    truth = gradients(adapted(widened(base)))
    model = adapted(base)
    eager = gradients(model)
    speed_up(model)
    assert distance(gradients(model), truth) <= 2 * distance(eager, truth)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_float32_model_under_autocast(bits) -> None:
    base = family_model("llama", **wide_enough("llama"))
    quantize(base, bits)
    truth = gradients(adapted(widened(base)))
    model = adapted(base)
    eager = gradients(model, autocast=True)
    speed_up(model)
    assert distance(gradients(model, autocast=True), truth) <= 2 * distance(eager, truth)
