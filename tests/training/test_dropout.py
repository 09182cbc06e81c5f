"""Dropout by hash: a function of row, module and place; its statistics; the same bits compiled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from glasstune.training import dropout
from glasstune.training.dropout import RowDropout, RowSeeds, kept_entries

pytestmark = QUIET_COMPILER


def seeds(rows: int, position: int = 0, seed: int = 1, epoch: int = 0) -> RowSeeds:
    placed = RowSeeds()
    placed.place(seed, epoch, position, rows, "cpu")
    return placed


def kept(shape: tuple[int, ...], p: float, name: str = "m", **where: int) -> Tensor:
    rows = seeds(shape[0], **where)
    return kept_entries(shape, rows.seeds, RowDropout(p, name, rows).words, p)


def words_of(h: int, first: int, second: int, one: int, two: int) -> int:
    """The hash in Python's own integers, as its docstring has it."""
    m = 0xFFFFFFFF
    h = (h ^ first) & m
    h = ((h ^ (h >> 16)) * 0x7FEB352D + one) & m
    h = ((h ^ (h >> 15)) * 0x846CA68B + two) & m
    return h ^ (h >> 16) ^ (second & m)


def test_the_bits_are_those_of_the_formula() -> None:
    """Unsigned 32-bit integers of Python: nothing may depend on how torch treats signs."""
    p, shape = 0.37, (3, 5, 40)
    rows = seeds(3, position=9)
    words = RowDropout(p, "layers.0.q", rows).words
    got = kept_entries(shape, rows.seeds, words, p).view(3, -1)
    for row in range(3):
        first, second = rows.seeds[:, row].tolist()
        one, two = (word & 0xFFFFFFFF for word in words.tolist())
        right = [
            (words_of(k, first & 0xFFFFFFFF, second, one, two) & 0x7FFFFFFF) >= int(p * 2**31)
            for k in range(200)
        ]
        assert got[row].tolist() == right


def test_a_mask_depends_on_the_row_alone() -> None:
    rows = RowSeeds()
    layer = RowDropout(0.4, "layer", rows)
    x = torch.ones(4, 9, 16)
    rows.place(1, 0, 0, 4, "cpu")
    whole = layer(x)
    rows.place(1, 0, 2, 2, "cpu")
    assert torch.equal(layer(x[2:]), whole[2:])  # another split of the same rows
    torch.rand(7)  # somebody draws from the global stream
    state = torch.get_rng_state()
    assert torch.equal(layer(x[2:]), whole[2:])
    assert torch.equal(torch.get_rng_state(), state)  # and nothing is drawn from it
    longer = layer(torch.ones(2, 13, 16))
    assert torch.equal(longer[:, :9], whole[2:])  # padding moves nothing
    rows.place(1, 1, 2, 2, "cpu")
    assert not torch.equal(layer(x[2:]), whole[2:])  # another epoch
    assert whole.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    layer.eval()
    assert layer(x) is x


def test_rows_of_two_dimensions_are_one_row() -> None:
    rows = seeds(2)
    layer = RowDropout(0.5, "experts.0", rows)
    flat = layer(torch.ones(30, 8))
    assert (flat == 0).any()
    assert torch.equal(flat.view(-1), layer(torch.ones(1, 240)).view(-1))
    odd = layer(torch.ones(3, 10, 8))  # another number of rows than has seeds
    assert torch.equal(odd.view(-1), flat.view(-1))


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_the_rate(p) -> None:
    """Over 2 million entries, and over each of 512 rows: a chi-square of 512 degrees."""
    mask = kept((512, 16, 256), p).flatten(1).double()
    n = mask.shape[1]
    spread = math.sqrt(p * (1 - p))
    assert abs(float(mask.mean()) - (1 - p)) < 4 * spread / math.sqrt(mask.numel())
    chi = float((((mask.mean(1) - (1 - p)) * math.sqrt(n) / spread) ** 2).sum())
    assert abs(chi - 512) < 4 * math.sqrt(2 * 512)


def standard(product: Tensor) -> float:
    """How many standard deviations the mean of products of +-1 is from zero."""
    return abs(float(product.mean())) * math.sqrt(product.numel())


def test_independence_of_places_rows_modules_and_epochs() -> None:
    """Signs of a mask at 0.5 times those of another one average to zero within 4.5 sigma."""
    shape = (64, 64, 256)
    sign = kept(shape, 0.5).flatten(1).double() * 2 - 1
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128, 255, 256, 257, 512, 4096):
        assert standard(sign[:, lag:] * sign[:, :-lag]) < 4.5, lag
    pairs = sign @ sign.T / sign.shape[1]
    pairs = pairs[~torch.eye(64, dtype=torch.bool)] * math.sqrt(sign.shape[1])
    assert float(pairs.abs().max()) < 5.5  # of 2,016 pairs
    assert 0.9 < float(pairs.square().mean()) < 1.1
    others = {
        "module": kept(shape, 0.5, "n"),
        "epoch": kept(shape, 0.5, epoch=1),
        "seed": kept(shape, 0.5, seed=2),
        "row": kept(shape, 0.5, position=64),
    }
    for name, other in others.items():
        theirs = other.flatten(1).double() * 2 - 1
        assert standard(sign * theirs) < 4.5, name
        # Neither may be a shifted copy of the other.
        assert standard(sign[:, 1:] * theirs[:, :-1]) < 4.5, name
        # Four at a time: two rows and two modules share seeds crosswise.
        assert standard(sign[0::2] * sign[1::2] * theirs[0::2] * theirs[1::2]) < 4.5, name


def test_eight_neighbours_are_uniform() -> None:
    """A chi-square over the 256 patterns of eight places in a row, at 0.5."""
    bits = kept((32, 64, 256), 0.5).view(-1, 8).long()
    patterns = (bits * (2 ** torch.arange(8))).sum(1)
    counts = torch.bincount(patterns, minlength=256).double()
    expected = len(patterns) / 256
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi - 255) < 4 * math.sqrt(2 * 255)


def test_the_seeds_of_rows_are_their_own() -> None:
    words = seeds(1000).seeds
    assert len({tuple(pair) for pair in words.T.tolist()}) == 1000
    assert seeds(1, position=7).seeds.tolist() == words[:, 7:8].tolist()


class Block(nn.Module):
    def __init__(self, name: str, rows: RowSeeds) -> None:
        super().__init__()
        self.drop = RowDropout(0.3, name, rows)
        self.inner = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.drop(x))


def run(call: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    out = call(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    return out.detach(), gradient


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow(reason="real code for a CPU"))],
)
def test_compiled_it_is_the_same_and_is_compiled_once(backend, monkeypatch) -> None:
    """Three modules, four batches: seeds are inputs, so one graph serves all of them."""
    torch._dynamo.reset()
    monkeypatch.setattr(dropout, "_CPU_PIECE", 100)  # several pieces of a row
    torch.manual_seed(0)
    rows = RowSeeds()
    blocks = [Block(f"layers.{index}", rows) for index in range(3)]
    counter = CompileCounterWithBackend(backend)
    compiled = [torch.compile(b, backend=counter, dynamic=False, fullgraph=True) for b in blocks]
    x = torch.randn(4, 33, 24, requires_grad=True)
    masks = set()
    for step in range(4):
        rows.place(1, 0, 4 * step, 4, "cpu")
        for block, other in zip(blocks, compiled, strict=True):
            plain, fused = run(block, x), run(other, x)
            recomputed = run(lambda x, b=block: checkpoint(b, x, use_reentrant=False), x)
            assert torch.equal(plain[0], recomputed[0])
            assert torch.equal(plain[1], recomputed[1])
            torch.testing.assert_close(plain, fused, rtol=1e-6, atol=1e-6)
            assert torch.equal(plain[1] == 0, fused[1] == 0)
            masks.add(tuple((plain[1] == 0).flatten().tolist()))
    assert counter.frame_count == 1
    assert len(masks) == 12
    torch._dynamo.reset()
