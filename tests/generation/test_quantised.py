"""E02: measuring and generating leave a 4-bit model as it was, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasstune.adapters.inject import add_adapter
from glasstune.core.batch import Document
from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.data.loader import evaluation_batches
from glasstune.data.packing import PackedSet
from glasstune.generation import evaluate_rows, generate_ids
from glasstune.kernels.linear_cross_entropy import token_losses
from glasstune.models.head import split_head
from glasstune.models.load import load_base
from glasstune.models.resolve import resolve_model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    ids = torch.arange(5, 45).reshape(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("bits", "options"), [(4, {}), (8, {}), (8, {"int8_compute": "llm_int8"}), (16, {})]
)
def test_e02_gradients_and_logits_are_bit_equal_after(
    tiny_llama: Path, bits: Any, options: Any
) -> None:
    choices = Choices()
    config = ModelConfig(path=str(tiny_llama), bits=bits, device="cpu", **options)
    base = load_base(config, resolve_model(str(tiny_llama), choices=choices), choices=choices)
    split = split_head(base)
    torch.manual_seed(0)
    model = add_adapter(base, r=4, lora_alpha=8, init_lora_weights=False)
    ids = torch.arange(10, 40)[None]

    def logits() -> torch.Tensor:
        return torch.as_tensor(model(input_ids=ids).logits.detach().clone())

    before = gradients(model)
    logits_before = logits()
    assert all(bool(value.any()) for value in before.values())
    random = np.random.default_rng(0)
    rows = [random.integers(0, 400, 12).astype(np.int32) for _ in range(3)]
    data = PackedSet.build(
        [Document(row, row) for row in rows], max_length=32, packed=False, seed=0
    )

    def measure() -> float:
        return evaluate_rows(
            model, evaluation_batches(data, 2, 0), split=split, token_losses=token_losses,
            vocabulary=512, device=torch.device("cpu"),
        ).nll  # fmt: skip

    def answer() -> list[list[int]]:
        return generate_ids(model, [[5, 6, 7], [8]], stops=(), max_new_tokens=6, batch_size=2)

    first = (measure(), answer())
    after = gradients(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert torch.equal(logits(), logits_before)
    assert (measure(), answer()) == first
