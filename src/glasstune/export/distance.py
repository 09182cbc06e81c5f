"""How far one model's predictions are from another's, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

_CHUNK = 2**19
"""Logits compared at a time: 4 MB in float64, of which some copies are made."""


@dataclass(slots=True)
class Distance:
    """Sums over tokens, in float64.

    Args:
        kl: KL(reference || other) of each token, in nats.
        agree: Whether both think the same next token most likely, by token.
        logit_difference: Largest difference of one logit.
    """

    kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    logit_difference: float = 0.0

    def add(self, reference_NV: Tensor, other_NV: Tensor) -> None:
        """Compares the logits of some tokens.

        Args:
            reference_NV: Float32 [n, V].
            other_NV: The same of the other model.

        Raises:
            ValueError: The vocabularies differ.
        """
        if reference_NV.shape != other_NV.shape:
            raise ValueError(f"{tuple(reference_NV.shape)} against {tuple(other_NV.shape)} logits")
        step = max(1, _CHUNK // reference_NV.shape[1])
        for start in range(0, len(reference_NV), step):
            rows = slice(start, start + step)
            self._add(reference_NV[rows].double(), other_NV[rows].double())

    def _add(self, p: Tensor, q: Tensor) -> None:
        log_p, log_q = p.log_softmax(dim=1), q.log_softmax(dim=1)
        kl = (log_p.exp() * _difference(log_p, log_q)).sum(dim=1)
        # Exactly equal rows may come out as -1e-17; a NaN stays one.
        self.kl.extend(kl.clamp_min(0.0).tolist())
        self.agree.extend((p.argmax(dim=1) == q.argmax(dim=1)).tolist())
        largest = float(_difference(p, q).abs().max())
        self.logit_difference = float(np.maximum(self.logit_difference, largest))  # NaN wins

    @property
    def mean(self) -> float:
        """Mean KL by token."""
        return sum(self.kl) / len(self.kl)

    @property
    def worst(self) -> float:
        """Largest KL of one token; NaN where any is."""
        return float(np.max(self.kl))

    @property
    def agreement(self) -> float:
        """Share of tokens on which both agree."""
        return sum(self.agree) / len(self.agree)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Subtracts; two equal infinities (entries that a model rules out) differ by nothing."""
    return torch.where(a == b, 0.0, a - b)


class LogitFile:
    """Logits of many tokens on the disk, so that two models need not be in memory together.

    Args:
        file: Open for reading and writing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._chunks: list[tuple[int, int]] = []

    def keep(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Writes logits [n, V] and passes them on."""
        self._file.seek(0)
        self._file.truncate()
        self._chunks.clear()
        for chunk in chunks:
            self._chunks.append((chunk.shape[0], chunk.shape[1]))
            self._file.write(chunk.contiguous().numpy().tobytes())
            yield chunk

    def read(self) -> Iterator[Tensor]:
        """Gives the kept logits again, chunk by chunk."""
        self._file.seek(0)
        for rows, width in self._chunks:
            data: Any = np.frombuffer(self._file.read(4 * rows * width), np.float32).copy()
            yield torch.from_numpy(data).view(rows, width)


@contextmanager
def logit_file(folder: Path) -> Iterator[LogitFile]:
    """Opens a file without a name in a folder; it is gone when the process ends, however."""
    with TemporaryFile(dir=folder) as file:
        yield LogitFile(file)
