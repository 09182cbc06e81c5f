"""Attention of one document: distance to a float32 truth, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glasstune.kernels.document_attention import op
from glasstune.kernels.document_attention.op import document_attention
from glasstune.kernels.document_attention.reference import document_attention_reference

# heads, key/value heads, tokens, width, window, scale
SHAPES = [
    (9, 3, 128, 64, None, None),
    (4, 4, 37, 16, None, None),
    (6, 2, 1, 8, None, None),
    (4, 1, 2, 8, None, 0.3),
    (4, 2, 60, 16, 7, None),
    (4, 2, 256, 16, None, None),
    (4, 2, 257, 16, None, None),
    (4, 2, 300, 16, 20, 0.5),
]


def make(shape: tuple, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values laid out as a transformer has them: not contiguous by head."""
    heads, groups, length, width, _, _ = shape
    generator = torch.Generator().manual_seed(7)
    tensors = [
        torch.randn(length, n, width, generator=generator).to(dtype)
        for n in (heads, groups, groups, heads)
    ]
    return tensors


def run(function, tensors: list[Tensor], shape: tuple) -> list[Tensor]:
    """Output and the three gradients for a fixed output gradient."""
    q, k, v = (t.detach().clone().requires_grad_() for t in tensors[:3])
    out = function(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale=shape[5], window=shape[4]
    )
    out.backward(tensors[3])
    return [out.detach(), q.grad, k.grad, v.grad]


def distances(function, shape: tuple) -> list[tuple[float, float]]:
    """For output and gradients: (ours, eager's) relative distance to the float32 truth."""
    half = make(shape, torch.bfloat16)
    truth = run(document_attention_reference, [t.float() for t in half], shape)
    eager = run(document_attention_reference, half, shape)
    ours = run(function, half, shape)

    def far(values: list[Tensor]) -> list[float]:
        return [
            float((value.float() - true).norm() / true.norm().clamp_min(1e-30))
            for value, true in zip(values, truth, strict=True)
        ]

    return list(zip(far(ours), far(eager), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_is_as_near_to_the_truth_as_eager(shape):
    for ours, eager in distances(document_attention, shape):
        # One document of one token has no error at all in eager's gradients of q and k.
        assert ours <= 2 * eager + 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_equals_the_reference(shape):
    tensors = make(shape, torch.float32)
    for ours, true in zip(
        run(document_attention, tensors, shape),
        run(document_attention_reference, tensors, shape),
        strict=True,
    ):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5)


def test_short_road_saves_only_its_inputs():
    shape = SHAPES[0]
    q, k, v, _ = make(shape, torch.bfloat16)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        q.requires_grad_()
        document_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))
    assert sorted(saved) == sorted([q.numel(), k.numel(), v.numel()])


def broken_copies():
    def scaled_gradient(q, k, v, **options):
        q = q * 1.0
        q.register_hook(lambda grad: grad * 1.02)
        return document_attention(q, k, v, **options)

    def dropped_tail(q, k, v, **options):
        out = document_attention(q, k, v, **options).clone()
        out[-1] = 0
        return out

    def sees_the_future(q, k, v, **options):
        weights = (q @ k.repeat_interleave(3, 0).transpose(1, 2) / 8).softmax(-1)
        return (weights @ v.repeat_interleave(3, 0)).transpose(0, 1)

    return [scaled_gradient, dropped_tail, sees_the_future]


@pytest.mark.parametrize("broken", broken_copies(), ids=lambda f: f.__name__)
def test_a_broken_copy_is_seen(broken):
    assert any(ours > 2 * eager + 1e-6 for ours, eager in distances(broken, SHAPES[0]))


def test_dropout_takes_torchs_road(monkeypatch):
    monkeypatch.setattr(op._Recomputed, "apply", lambda *_: pytest.fail("dropout was ignored"))
    q, k, v, _ = make(SHAPES[1], torch.bfloat16)
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    torch.manual_seed(0)
    one = document_attention(q, k, v, dropout=0.5)
    torch.manual_seed(1)
    assert not torch.equal(one, document_attention(q, k, v, dropout=0.5))


def alibi_said_plainly(q, k, v, *, scale, window):
    """Scores in float32, the penalty query by query."""
    heads, length, width = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[0], 0).float() for x in (k, v))
    rows = []
    for query in range(length):
        first = 0 if window is None else max(0, query - window + 1)
        keys = torch.arange(first, query + 1)
        scores = (k[:, keys] @ q[:, query, :, None].float())[..., 0]
        scores = scores * (width**-0.5 if scale is None else scale)
        weights = (scores - SLOPES[:heads, None] * (query - keys)).softmax(-1)
        rows.append((weights[:, None] @ v[:, keys])[:, 0])
    return torch.stack(rows).to(q.dtype)


SLOPES = torch.tensor([2.0**-k for k in (1, 2, 3, 4, 5, 6, 7, 8, 0.5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alibi_is_added_to_the_scores(shape, dtype):
    def ours(q, k, v, **options):
        return document_attention(q, k, v, slopes_H=SLOPES[: shape[0]], **options)

    def eager(q, k, v, **options):
        return document_attention_reference(q, k, v, slopes_H=SLOPES[: shape[0]], **options)

    given = make(shape, dtype)
    truth = run(alibi_said_plainly, [t.float() for t in given], shape)
    near = run(eager, given, shape)
    for found, same, true in zip(run(ours, given, shape), near, truth, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(found, true, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(same, true, rtol=1e-4, atol=2e-5)
        else:
            far, far_eager = ((x.float() - true).norm() for x in (found, same))
            assert far <= 2 * far_eager + 1e-6 * true.norm()
