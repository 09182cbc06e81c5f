"""Dropout whose mask is a function of (seed, epoch, row, module) and of nothing else.

Torch's own dropout draws from one global stream: another micro-batch split, an evaluation or a
second forward shifts every later mask. Here each row of a batch has its own seed, so

- any split of the same rows into micro-batches gives the same masks,
- a recomputed layer gives the mask of its first computation,
- a resumed run needs no generator state, and
- the adapters never draw from the global stream, so the base model's own dropout is the same
  with the adapters on and off (`kl_to_base`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Attention probabilities, and BLOOM's residuals.
_FUNCTIONAL = ("attention_dropout", "attn_pdrop", "hidden_dropout")


def mix(*parts: int | str) -> int:
    """Hashes integers and names to a 63-bit seed; stable across processes and versions."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(slots=True)
class RowSeeds:
    """The seeds of the rows in flight; the step sets it before each forward.

    Args:
        seed: The run's seed.
        epoch: 0-based epoch.
        position: Global position in the epoch of the batch's first row.
    """

    seed: int = 0
    epoch: int = 0
    position: int = 0


class RowDropout(nn.Module):
    """Inverted dropout with one seed a row.

    Args:
        p: Probability of a zero.
        name: The module's path, part of the seed.
        rows: Shared, mutable seeds of the rows in flight.
    """

    def __init__(self, p: float, name: str, rows: RowSeeds) -> None:
        super().__init__()
        self.p = p
        self.name = name
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """Drops entries of x, float [R, ...]; fewer than three dimensions count as one row."""
        if not self.training or self.p == 0.0:
            return x
        generator = torch.Generator(device=x.device)
        keep = 1.0 - self.p
        mask = torch.empty_like(x)
        parts = mask.unbind(0) if x.dim() >= 3 else (mask,)
        for index, part in enumerate(parts):
            rows = self.rows
            generator.manual_seed(mix(rows.seed, rows.epoch, rows.position + index, self.name))
            part.bernoulli_(keep, generator=generator)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """Shows p, as torch's dropout does."""
        return f"p={self.p}"


def seed_dropout(model: nn.Module, rows: RowSeeds) -> int:
    """Replaces every dropout module of adapters and base model by `RowDropout`.

    The output head's adapter keeps torch's dropout: the head runs once a chunk, and a mask per
    row would repeat in each chunk. It draws after the backbone, so it shifts nothing.

    Args:
        model: A PEFT model.
        rows: The seeds that the step will set.

    Returns:
        Number of dropouts replaced.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    behind_head = {id(part) for part in head.modules()} if head is not None else set()
    replaced = 0
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout and child.p > 0 and id(child) not in behind_head:
                setattr(module, name, RowDropout(child.p, f"{path}.{name}", rows))
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
