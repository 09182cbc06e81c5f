"""Attention of packed rows by flex_attention: its blocks by brute force, its numbers against dense.

On a CPU by torch's plain operations, on a GPU by its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER
from torch import Tensor
from torch.nn.attention import flex_attention as torchs

from glasstune.kernels.document_attention.flex import (
    BLOCK,
    Blocks,
    document_blocks,
    flex_document_attention,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    *QUIET_COMPILER,
    *([pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)] if CUDA else []),
]


@pytest.fixture(autouse=True)
def _gradients_on_a_cpu(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)


def numbers(length: int, *rows: tuple[int, ...]) -> Tensor:
    """Documents of these sizes in each row; the last takes what is left."""
    found = torch.zeros(len(rows), length, dtype=torch.int32)
    for row, sizes in enumerate(rows):
        start = 0
        for number, size in enumerate(sizes):
            found[row, start:] = number
            start += size
    return found.to(DEVICE)


def seen(document_RL: Tensor, window: int | None) -> Tensor:
    """Which key each query sees, bool [R, L, L]."""
    place = torch.arange(document_RL.shape[1], device=DEVICE)
    apart = place[:, None] - place[None, :]
    same = document_RL[:, :, None] == document_RL[:, None, :]
    return same & (apart >= 0) & (apart < (window or math.inf))


def dense_blocks(count: Tensor, index: Tensor) -> Tensor:
    """What lists of blocks name, bool [R, n, n]."""
    blocks = index.shape[-1]
    found = torch.zeros(index.shape[0], blocks, blocks + 1, dtype=torch.bool, device=DEVICE)
    kept = torch.arange(blocks, device=DEVICE) < count[:, 0, :, None]
    found.scatter_(2, torch.where(kept, index[:, 0].long(), blocks), True)
    return found[..., :-1]


BATCHES = {
    "one": numbers(512, (512,), (512,)),
    "some": numbers(700, (100, 350, 9), (37,)),
    "on borders": numbers(512, (128, 256, 128), (384, 128)),
    "tiny": numbers(300, tuple([3] * 99), (1, 298, 1)),
    "short": numbers(5, (2, 3)),
    "hidden at both ends": torch.cat(
        [numbers(100, (1,)) - 1, numbers(300, (1,)), numbers(56, (1,)) - 1], dim=1
    ),
}


@pytest.mark.parametrize("window", [None, 1, 5, 128, 129, 300])
@pytest.mark.parametrize("name", BATCHES)
def test_blocks_are_the_needed_ones(name, window):
    document_RL = BATCHES[name]
    rows, length = document_RL.shape
    blocks = document_blocks(document_RL, window)
    count = blocks.kv_count.shape[-1]
    room = (0, count * BLOCK - length) * 2
    tiles = torch.nn.functional.pad(seen(document_RL, window), room)
    tiles = tiles.view(rows, count, BLOCK, count, BLOCK).transpose(2, 3)
    needed, whole = tiles.any(-1).any(-1), tiles.all(-1).all(-1)
    masked = dense_blocks(blocks.kv_count, blocks.kv_index)
    free = dense_blocks(blocks.whole_kv_count, blocks.whole_kv_index)
    assert torch.equal(free, whole & ~torch.eye(count, dtype=torch.bool, device=DEVICE))
    assert torch.equal(masked | free, needed)
    assert not (masked & free).any()
    assert torch.equal(dense_blocks(blocks.q_count, blocks.q_index), masked.transpose(1, 2))
    backward = dense_blocks(blocks.whole_q_count, blocks.whole_q_index)
    assert torch.equal(backward, free.transpose(1, 2))


def test_numbers_in_any_order_are_right_too():
    """Then a block may be one too many, but never one too few, nor whole wrongly."""
    generator = torch.Generator().manual_seed(0)
    document_RL = torch.randint(0, 3, (2, 512), dtype=torch.int32, generator=generator).to(DEVICE)
    document_RL[:, 128:256] = 1
    blocks = document_blocks(document_RL)
    tiles = seen(document_RL, None).view(2, 4, BLOCK, 4, BLOCK).transpose(2, 3)
    masked = dense_blocks(blocks.kv_count, blocks.kv_index)
    free = dense_blocks(blocks.whole_kv_count, blocks.whole_kv_index)
    assert not (tiles.any(-1).any(-1) & ~masked & ~free).any()
    assert not (free & ~tiles.all(-1).all(-1)).any()


def test_shapes_do_not_depend_on_documents():
    one, other = (document_blocks(numbers(700, sizes)) for sizes in ((700,), (9,) * 70))
    for a, b in zip(one[:-1], other[:-1], strict=True):
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert a.is_contiguous()
        assert a.storage_offset() == 0


@dataclass(frozen=True)
class Form:
    """Heads, key/value heads, width, and what changes the scores."""

    heads: int = 4
    groups: int = 2
    width: int = 16
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False

    @property
    def slope_H(self) -> Tensor | None:
        if not self.alibi:
            return None
        return 2.0 ** -torch.arange(1, self.heads + 1, device=DEVICE, dtype=torch.float32)


FORMS = [
    Form(9, 3, 20, window=70),
    Form(softcap=3.0),
    Form(4, 4, alibi=True),
]


def dense(form: Form, document_RL: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All scores at once; products in the inputs' dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(form.heads // form.groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(wide) * 0.3
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    if form.slope_H is not None:
        place = torch.arange(q.shape[2], device=DEVICE)
        scores = scores + form.slope_H.to(wide)[:, None, None] * (place[None] - place[:, None])
    hidden = ~seen(document_RL, form.window)[:, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def ours(form: Form, document_RL: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blocks = document_blocks(document_RL, form.window)
    return flex_document_attention(
        q, k, v, blocks, scale=0.3, softcap=form.softcap, slopes_H=form.slope_H
    )


def distances(function: Callable[..., Tensor], form: Form, dtype: torch.dtype) -> list[Any]:
    """For output and the three gradients: (ours, eager's) relative distance to float64."""
    document_RL = numbers(200, (70, 91), (3, 140))
    generator = torch.Generator().manual_seed(7)
    given = [
        torch.randn(2, 200, count, form.width, generator=generator).to(DEVICE, dtype)
        for count in (form.heads, form.groups, form.groups, form.heads)
    ]

    def run(call: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in given[:3]]
        out = call(form, document_RL, *(x.transpose(1, 2) for x in leaves))
        found = torch.autograd.grad(out, leaves, given[3].to(kind))
        return [out.detach().double(), *(x.double() for x in found)]

    truth = run(dense, torch.float64)
    mine, eagers = run(function, dtype), run(dense, dtype)
    return [
        (float((one - right).norm() / right.norm()), float((other - right).norm() / right.norm()))
        for one, other, right in zip(mine, eagers, truth, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_as_near_to_the_truth_as_eager(form, dtype):
    for mine, eager in distances(ours, form, dtype):
        assert mine <= 2 * eager + 1e-7


def broken_copies() -> list[Callable[..., Tensor]]:
    def no_documents(form, document_RL, q, k, v):
        return ours(form, torch.zeros_like(document_RL), q, k, v)

    def window_off_by_one(form, document_RL, q, k, v):
        blocks: Blocks = document_blocks(document_RL, form.window)._replace(window=form.window + 1)
        return flex_document_attention(q, k, v, blocks, scale=0.3)

    def scaled_gradient(form, document_RL, q, k, v):
        k = k * 1.0
        k.register_hook(lambda grad: grad * 1.02)
        return ours(form, document_RL, q, k, v)

    def other_heads(form, document_RL, q, k, v):
        return ours(form, document_RL, q, k.flip(1), v)

    return [no_documents, window_off_by_one, scaled_gradient, other_heads]


@pytest.mark.parametrize("broken", broken_copies(), ids=lambda f: f.__name__)
def test_a_broken_copy_is_seen(broken):
    form = Form(window=70)
    assert any(mine > 2 * eager + 1e-7 for mine, eager in distances(broken, form, torch.bfloat16))


def test_wider_queries_are_multiplied_as_values_are():
    """Rotary tables in float32 leave q and k in float32 under autocast."""
    document_RL = numbers(50, (20, 30))
    q, k, v = torch.randn(3, 1, 2, 50, 16, device=DEVICE).unbind()
    out = ours(Form(2, 2), document_RL, q, k, v.bfloat16())
    right = ours(Form(2, 2), document_RL, q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, right)


def test_another_scale_or_cap_is_a_constant_of_another_graph():
    """As a number that may change torch would make it an input, which the kernel has none for."""
    document_RL = numbers(50, (20, 30))
    q, k, v = torch.randn(3, 1, 2, 50, 16, device=DEVICE).unbind()
    blocks = document_blocks(document_RL)
    for scale, cap in ((0.3, 3.0), (0.2, 4.0), (0.1, 5.0)):
        out = flex_document_attention(q, k, v, blocks, scale=scale, softcap=cap)
        scores = cap * torch.tanh(q @ k.transpose(-1, -2) * scale / cap)
        weights = scores.masked_fill(~seen(document_RL, None), -math.inf).softmax(-1)
        torch.testing.assert_close(out, (weights @ v).transpose(1, 2), rtol=1e-3, atol=1e-4)
