"""Traced steps against real ones: what autograd really saves, op by op, on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import ALIBI, family_config
from tiny import tiny_config
from torch import Tensor

from glasstune.adapters.inject import add_adapter, keep_activation_dtype
from glasstune.kernels.document_attention import op as document_attention
from glasstune.kernels.linear_cross_entropy import linear_cross_entropy
from glasstune.models.inspect.source import open_source
from glasstune.planner.losses import frozen_head_loss, held_out_loss
from glasstune.planner.model import MemoryModel, Setup
from glasstune.planner.shadow import make_shadow
from glasstune.planner.trace import Batch, trace_evaluation, trace_step

ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
ROWS, LENGTH = 2, 64


def real_saved(config: Any, rows: int = ROWS) -> int:
    """Bytes of distinct storages that a real forward saves, plus its output; weights left out."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.requires_grad_(False)
    base.config.use_cache = False
    model = add_adapter(base, **ADAPTER).train()
    keep_activation_dtype(model)
    held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            saved[storage._cdata] = storage
        return tensor

    ids = torch.zeros(rows, LENGTH, dtype=torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    causal = model.get_base_model()
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
    ):
        hidden = causal.base_model(**inputs, return_dict=True)[0]
    saved[hidden.untyped_storage()._cdata] = hidden.untyped_storage()
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "baichuan", ALIBI])
def test_kept_bytes_are_those_that_a_real_forward_saves(family: str) -> None:
    config = family_config(family) if "baichuan" in family else tiny_config(family)
    shadow = make_shadow(open_source(config), 16, ADAPTER)
    # Without data nobody sees that all rows may share ALiBi's penalty: it is planned for each.
    rows = 1 if family == ALIBI else ROWS
    found = trace_step(shadow, Batch(rows, LENGTH), frozen_head_loss)
    kept = found.before + sum(block.kept for block in found.blocks) + found.head_kept
    # Inputs and positions live too, and nothing saves them.
    assert kept == pytest.approx(real_saved(config, rows), rel=0.02)


def test_a_recomputed_block_keeps_its_output_alone() -> None:
    shadow = make_shadow(open_source(tiny_config()), 16, ADAPTER)
    found = trace_step(shadow, Batch(ROWS, LENGTH), frozen_head_loss, recompute=True)
    output = ROWS * LENGTH * 64 * 2  # bfloat16
    casts = 2 * sum(p.numel() for p in shadow.model.parameters() if p.requires_grad) // 2
    for block in found.blocks:
        assert output <= block.kept <= output + casts
    plain = trace_step(shadow, Batch(ROWS, LENGTH), frozen_head_loss)
    assert found.blocks[1].kept < plain.blocks[1].kept / 4
    # The forward is there once more: two of six products of the base, as in a hand count.
    assert found.blocks[1].flops / plain.blocks[1].flops == pytest.approx(1.5, abs=0.12)


def test_operations_are_counted_as_by_hand() -> None:
    shadow = make_shadow(open_source(tiny_config()), 16, ADAPTER)
    block = trace_step(shadow, Batch(ROWS, LENGTH), frozen_head_loss).blocks[1]
    tokens, hidden, inner = ROWS * LENGTH, 64, 128
    base = hidden * hidden * 2 + 2 * hidden * (hidden // 2) + 3 * hidden * inner
    lora = (
        8 * (4 * hidden + 2 * hidden + hidden + 2 * (hidden // 2) + 3 * (hidden + inner))
        - 8 * 2 * hidden
    )
    attention = 4 * ROWS * LENGTH * LENGTH * hidden
    by_hand = 4 * tokens * base + 6 * tokens * lora + attention * 7 // 2
    assert block.flops == pytest.approx(by_hand, rel=0.06)


def test_nothing_without_data_is_left_behind() -> None:
    model = MemoryModel(Setup(open_source(tiny_config()), 16, ADAPTER, packed=True))
    model.activations(Batch(1, LENGTH, 20, bounds=((0, 30, LENGTH),)))
    q = torch.randn(4, 30, 16, dtype=torch.bfloat16)
    k = torch.randn(2, 30, 16, dtype=torch.bfloat16)
    out = document_attention.document_attention(q, k, k)
    # The first token sees itself alone: a mask without data would hide nothing.
    assert torch.equal(out[0], k[:, 0].repeat_interleave(2, 0))


def test_a_long_row_needs_no_mask() -> None:
    """Nothing of an evaluation grows with the square of the length: no mask is really made."""
    shadow = make_shadow(open_source(tiny_config()), 16, ADAPTER, target="cuda")
    lengths = (4096, 8192)
    short, long = (trace_evaluation(shadow, Batch(1, n, 64), held_out_loss) for n in lengths)
    assert long < 2.05 * short
    step, longer = (trace_step(shadow, Batch(1, n, 64), frozen_head_loss) for n in lengths)
    assert longer.head < 2.05 * step.head


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_static_bytes_are_those_of_a_real_adapter(bits: int) -> None:
    model = MemoryModel(Setup(open_source(tiny_config(num_hidden_layers=5)), bits, ADAPTER))
    # r=8 on q, k, v, o, gate, up, down of 5 layers: (in + out) * r each.
    sizes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    trained = 5 * sum(8 * (a + b) for a, b in sizes)
    assert model.static.adapters == model.static.gradients == 4 * trained
    assert model.static.optimizer == 8 * trained
    assert model.layers == 5


def test_real_memory_of_the_loss_is_traced() -> None:
    """The fused loss saves the gradient of hidden and nothing of the vocabulary."""
    hidden = torch.randn(40, 64, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        linear_cross_entropy(
            hidden, torch.randn(512, 64), torch.zeros(40, dtype=torch.int64), torch.ones(40)
        )
    assert saved == [40 * 64 * 4]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_in_float32_are_planned(family: str) -> None:
    """Real float32 training of them works; PyTorch's shape rule of their product does not."""
    kept = {}
    for dtype in ("bfloat16", "float32"):
        model = MemoryModel(
            Setup(open_source(family_config(family)), 16, ADAPTER, target="cpu", dtype=dtype)
        )
        activations = model.activations(Batch(rows=ROWS, length=LENGTH, trained=ROWS * LENGTH))
        kept[dtype] = sum(block.kept for block in activations.plain)
    assert 1.2 < kept["float32"] / kept["bfloat16"] <= 2.5
