"""Dropout whose mask is a function of (seed, epoch, row, module, place) and of nothing else.

Torch's own dropout draws from one global stream: another micro-batch split, an evaluation or a
second forward shifts every later mask. Here an entry is dropped where a hash of the row's seed,
the module's name and the entry's place in the row is small, so

- any split of the same rows into micro-batches gives the same masks,
- a recomputed layer gives the mask of its first computation,
- a resumed run needs no generator state,
- the adapters never draw from the global stream, so the base model's own dropout is the same
  with the adapters on and off (`kl_to_base`), and
- torch.compile melts the hash into the kernels around it: no state, the same bits on every device.

The hash is of the kind of MurmurHash3's finaliser (shift and xor, multiply by an odd constant,
again), with two seeds of the row and two of the module between its rounds. 32-bit integers, since
a GPU multiplies those four times as fast as 64-bit ones; they wrap around.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from glasstune.training.inputs import to_device

# Attention probabilities, and BLOOM's residuals.
_FUNCTIONAL = ("attention_dropout", "attn_pdrop", "hidden_dropout")

# Odd constants with low bias, found by search: https://nullprogram.com/blog/2018/07/31/
# The second one is 0x846CA68B as a signed number.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)

_CPU_PIECE = 1 << 16
"""Entries of a piece: 256 KiB, the second cache of a core."""


def mix(*parts: int | str) -> int:
    """Hashes integers and names to a 63-bit seed; stable across processes and versions."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _two_words(*parts: int | str) -> list[int]:
    """Hashes to two signed 32-bit numbers."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return [int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:])]


class RowSeeds:
    """The seeds of the rows in flight; the step sets them before each forward.

    Attributes:
        seed: The run's seed.
        epoch: 0-based epoch.
        position: Global position in the epoch of the batch's first row.
        seeds: int32 [2, R], where the forward runs. A tensor, so that torch.compile takes it as an
            input and not as a constant.
    """

    def __init__(self) -> None:
        self.seed = self.epoch = self.position = 0
        self.seeds = torch.zeros(2, 1, dtype=torch.int32)

    def place(
        self, seed: int, epoch: int, position: int, rows: int, device: torch.device | str
    ) -> None:
        """Sets the seeds of a batch.

        Args:
            seed: The run's seed.
            epoch: 0-based epoch.
            position: Global position in the epoch of the first row.
            rows: R.
            device: Where the forward runs.
        """
        self.seed, self.epoch, self.position = seed, epoch, position
        words = [_two_words(seed, epoch, position + index) for index in range(rows)]
        self.seeds = to_device(torch.tensor(words, dtype=torch.int32).T.contiguous(), device)


class RowDropout(nn.Module):
    """Inverted dropout with seeds of its own for each row.

    Args:
        p: Probability of a zero.
        name: The module's path, part of the seed.
        rows: Shared, mutable seeds of the rows in flight.
        device: Where the forward runs.
    """

    words: Tensor

    def __init__(
        self, p: float, name: str, rows: RowSeeds, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.p = p
        self.rows = rows
        # A tensor: torch.compile would make a graph for each layer's own numbers.
        words = torch.tensor(_two_words(name), dtype=torch.int32, device=device)
        self.register_buffer("words", words, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Drops entries of x, float [R, ...].

        Fewer than three dimensions, or another number of rows than has seeds, count as one row.
        """
        if not self.training or self.p == 0.0:
            return x
        kept = kept_entries(x.shape, self.rows.seeds, self.words, self.p)
        return torch.where(kept, x * (1.0 / (1.0 - self.p)), 0.0)

    def extra_repr(self) -> str:
        """Shows p, as torch's dropout does."""
        return f"p={self.p}"


def kept_entries(
    shape: torch.Size | tuple[int, ...], rows_2R: Tensor, words_2: Tensor, p: float
) -> Tensor:
    """Says which entries of a tensor are kept.

    Args:
        shape: Of the tensor.
        rows_2R: int32 [2, R], two seeds of each row.
        words_2: int32 [2], two seeds of the module.
        p: Probability that an entry is dropped, to 2^-31.

    Returns:
        bool, of that shape.
    """
    by_row = len(shape) >= 3 and shape[0] == rows_2R.shape[1]
    seeds = rows_2R if by_row else rows_2R[:, :1]
    size = 1
    for length in shape[1:] if by_row else shape:
        size *= length
    least = int(p * 2**31)
    if torch.compiler.is_compiling():
        # Places beyond 2^32 wrap around, as the hash does.
        place = torch.arange(size, device=words_2.device).to(torch.int32)
        h = place ^ seeds[0, :, None]
        h = (h ^ ((h >> 16) & 0xFFFF)) * _FIRST + words_2[0]
        h = (h ^ ((h >> 15) & 0x1FFFF)) * _SECOND + words_2[1]
        h = h ^ ((h >> 16) & 0xFFFF) ^ seeds[1, :, None]
        return ((h & 0x7FFFFFFF) >= least).view(shape)
    return _kept_in_pieces(seeds, words_2, size, least).view(shape)


def _kept_in_pieces(seeds_2R: Tensor, words_2: Tensor, size: int, least: int) -> Tensor:
    """The same in place and, on a CPU, in pieces that its cache holds: three times as fast."""
    device, rows = words_2.device, seeds_2R.shape[1]
    piece = min(size, _CPU_PIECE) if device.type == "cpu" else size
    kept = torch.empty(rows, size, dtype=torch.bool, device=device)
    place = torch.arange(piece, device=device).to(torch.int32)
    held, shifted = torch.empty_like(place), torch.empty_like(place)
    for row in range(rows):
        first, second = seeds_2R[0, row], seeds_2R[1, row]
        for start in range(0, size, piece):
            length = min(piece, size - start)
            h, t = held[:length], shifted[:length]
            torch.add(place[:length], start, out=h).bitwise_xor_(first)
            for by, rest, factor, word in (
                (16, 0xFFFF, _FIRST, words_2[0]),
                (15, 0x1FFFF, _SECOND, words_2[1]),
            ):
                torch.bitwise_right_shift(h, by, out=t)
                h.bitwise_xor_(t.bitwise_and_(rest)).mul_(factor).add_(word)
            torch.bitwise_right_shift(h, 16, out=t)
            h.bitwise_xor_(t.bitwise_and_(0xFFFF)).bitwise_xor_(second).bitwise_and_(0x7FFFFFFF)
            torch.ge(h, least, out=kept[row, start : start + length])
    return kept


def seed_dropout(model: nn.Module, rows: RowSeeds) -> int:
    """Replaces every dropout module of adapters and base model by `RowDropout`.

    The output head's adapter keeps torch's dropout: the head runs once a chunk, and a mask per
    row would repeat in each chunk. It draws after the backbone, so it shifts nothing.

    Args:
        model: A PEFT model, on its device.
        rows: The seeds that the step will set.

    Returns:
        Number of dropouts replaced.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    behind_head = {id(part) for part in head.modules()} if head is not None else set()
    device = next(model.parameters()).device
    replaced = 0
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout and child.p > 0 and id(child) not in behind_head:
                setattr(module, name, RowDropout(child.p, f"{path}.{name}", rows, device))
                replaced += 1
    return replaced


def unseeded_dropout(config: Any) -> dict[str, float]:
    """Dropout that a model applies inside functions, where no module can be replaced.

    It draws from torch's global stream, seeded anew for each micro-batch: repeatable, but another
    split of the same rows into micro-batches gives other masks.

    Args:
        config: The model's config.

    Returns:
        Config key to probability, of those above 0.
    """
    text = config.get_text_config(decoder=True)
    found = {name: float(getattr(text, name, 0.0) or 0.0) for name in _FUNCTIONAL}
    return {name: value for name, value in found.items() if value > 0}
