"""Loss terms: named, weighted, each a (sum, count) over trained positions.

The trainer divides each sum by its count over the whole update, so the split into micro-batches
changes nothing. Shape letters: N trained positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from glasstune.core.config import LossConfig
from glasstune.core.errors import InputError, RunError
from glasstune.core.files import sha256_file
from glasstune.kernels.linear_cross_entropy import (
    chunk_rows,
    chunked_head_sums,
    chunks,
    head_cross_entropy,
    linear_cross_entropy,
)
from glasstune.training.inputs import to_device

BUILT_IN = ("next_token", "z_loss", "kl_to_base")


@dataclass
class LossBatch:
    """What a loss term sees of a micro-batch: trained positions only.

    Args:
        hidden: The backbone's output, float [N, d], with graph.
        labels: int64 [N]; the id that each position must predict.
        documents: int64 [N]; index of each position's document in this micro-batch.
        sources: int64 [N] on the CPU; index of each position's data source.
        source_weights: `loss_weight` of each source.
        columns: Values asked for in the data, per document: name -> list.
        step: 1-based number of the update.
        vocabulary: V.
        head: Maps hidden [n, d] to logits [n, V].
        head_weight: The head's weight [V, d] where it is a frozen bare Linear, else None.
        base: Computes (once) the backbone's output with every adapter off, [N, d], no graph.
        adapters_off: Opens a context in which every adapter is off.
    """

    hidden: Tensor
    labels: Tensor
    documents: Tensor
    sources: Tensor
    source_weights: Sequence[float]
    columns: Mapping[str, list[Any]]
    step: int
    vocabulary: int
    head: Callable[[Tensor], Tensor]
    head_weight: Tensor | None = None
    base: Callable[[], Tensor] | None = None
    adapters_off: Callable[[], AbstractContextManager[Any]] | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def chunks(self) -> Iterator[slice]:
        """Slices of positions whose logits fit a bounded memory."""
        return chunks(len(self), chunk_rows(self.vocabulary))

    def logits(self, chunk: slice = slice(None)) -> Tensor:
        """Logits of a chunk of positions, [n, V], with graph."""
        return self.head(self.hidden[chunk])

    def base_logits(self, chunk: slice = slice(None)) -> Tensor:
        """Logits of the base model (adapters off) for a chunk, [n, V], without graph.

        Raises:
            RuntimeError: The batch was made without a base model.
        """
        if self.base is None or self.adapters_off is None:
            raise RuntimeError("this batch has no base model to compare with")
        hidden = self.base()
        with torch.no_grad(), self.adapters_off():
            return self.head(hidden[chunk])

    def sum_over_chunks(self, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Sums `function(logits [n, V], slice)` over chunks in bounded memory.

        Each chunk's logits are recomputed in backward, so at no time do all logits exist.
        """
        return chunked_head_sums(
            self.hidden, lambda hidden, part: function(self.head(hidden), part), self.vocabulary
        )

    @property
    def weights(self) -> Tensor:
        """`loss_weight` of each position's source, fp32 [N]."""
        return to_device(self.host_weights, self.hidden.device)

    @property
    def host_weights(self) -> Tensor:
        """`weights` on the CPU."""
        return torch.tensor(self.source_weights, dtype=torch.float32)[self.sources]

    def select(self, keep: Tensor) -> LossBatch:
        """Returns the batch of the positions where `keep`, bool [N] on the CPU, holds."""
        index = to_device(keep.nonzero().squeeze(-1), self.hidden.device)
        base = self.base
        return replace(
            self,
            hidden=self.hidden[index],
            labels=self.labels[index],
            documents=self.documents[index],
            sources=self.sources[keep],
            base=None if base is None else lambda: base()[index],
        )


UserLoss = Callable[[LossBatch], tuple[Tensor, Tensor | float | int]]


@dataclass(frozen=True)
class Term:
    """One term, resolved.

    Args:
        config: Name, weight, sources.
        source_indices: Sources that it sees; None = all.
        function: The user's function, or None for a built-in.
        folder: Where the path of its file starts.
    """

    config: LossConfig
    source_indices: tuple[int, ...] | None
    function: UserLoss | None
    folder: Path = Path()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the user's file, empty for a built-in term: edited code is another loss."""
        if self.config.function is None:
            return ""
        return sha256_file(self.folder / self.config.function.rpartition(":")[0])

    @property
    def name(self) -> str:
        """The term's name in metrics and audits."""
        return self.config.name

    def keep(self, sources: Tensor) -> Tensor:
        """Which positions the term sees: bool [N] from their source indices."""
        if self.source_indices is None:
            return torch.ones_like(sources, dtype=torch.bool)
        return torch.isin(sources, torch.tensor(self.source_indices, dtype=sources.dtype))

    def known_count(self, sources: Tensor, source_weights: Sequence[float]) -> float | None:
        """Weighted positions that the term sees, without running the model.

        Args:
            sources: int64 [N] on the CPU.
            source_weights: `loss_weight` of each source.

        Returns:
            The count, or None where only the user's function knows it.
        """
        if self.function is not None:
            return None
        table = torch.tensor(source_weights, dtype=torch.float64)
        return float(table[sources[self.keep(sources)]].sum())


def resolve_terms(
    losses: Sequence[LossConfig], source_names: Sequence[str], base_folder: Path = Path()
) -> tuple[Term, ...]:
    """Checks names, sources and functions before anything heavy is loaded.

    Raises:
        InputError: A name twice, an unknown built-in, an unknown source, or a function that
            cannot be imported.
    """
    terms: list[Term] = []
    for index, loss in enumerate(losses):
        where = f"losses.{index}"
        if any(loss.name == term.name for term in terms):
            raise InputError(
                "duplicate_loss",
                f"two terms are named {loss.name!r}",
                where=where,
                fix="give each term a name of its own",
            )
        if loss.function is None and loss.name not in BUILT_IN:
            raise InputError(
                "unknown_loss",
                f"there is no built-in term {loss.name!r}",
                where=f"{where}.name",
                fix=f"use one of {', '.join(BUILT_IN)}, or set function: my_file.py:my_loss",
            )
        indices: list[int] = []
        for source in loss.sources or ():
            if source not in source_names:
                raise InputError(
                    "unknown_source",
                    f"term {loss.name!r} names the source {source!r}, which does not exist",
                    where=f"{where}.sources",
                    fix=f"the sources are: {', '.join(source_names)}",
                )
            indices.append(list(source_names).index(source))
        function = load_function(loss.function, where, base_folder) if loss.function else None
        terms.append(
            Term(loss, tuple(indices) if loss.sources is not None else None, function, base_folder)
        )
    if not any(loss.weight_at(step) for loss in losses for step in (1, sys.maxsize)):
        raise InputError(
            "learns_nothing",
            "every term weighs 0: no update would change anything",
            where="losses",
            fix="give one a weight",
        )
    return tuple(terms)


def load_function(spec: str, where: str, base_folder: Path) -> UserLoss:
    """Imports `file.py:name` from a path relative to `base_folder`.

    Raises:
        InputError: The file or the name is missing, or importing it raised.
    """
    path_text, _, name = spec.rpartition(":")
    path = base_folder / path_text
    if not path_text or not path.is_file():
        raise InputError(
            "loss_file_missing",
            f"{spec!r} names no Python file ({path} not found)"
            if path_text
            else f"{spec!r} has no file before the colon",
            where=f"{where}.function",
            fix="write it as my_file.py:my_loss",
        )
    module_spec = importlib.util.spec_from_file_location(f"glasstune_user_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look the module up by name
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            "loss_file_fails",
            f"importing {path} raised {type(error).__name__}: {error}",
            where=f"{where}.function",
            fix="make the file importable on its own",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(
            "loss_function_missing",
            f"{path} has no function {name!r}",
            where=f"{where}.function",
            fix="check the name after the colon",
        )
    loaded: UserLoss = function
    return loaded


def term_sums(terms: Sequence[Term], batch: LossBatch) -> dict[str, tuple[Tensor, float]]:
    """Computes every term of a micro-batch.

    Args:
        terms: The resolved terms.
        batch: Trained positions of the micro-batch.

    Returns:
        name -> (sum, fp32 scalar with graph; count). A term that sees no position is left out.

    Raises:
        RunError: A user's function raised or returned something else than (sum, count).
    """
    results = _cross_entropy_terms(
        [term for term in terms if term.function is None and term.name != "kl_to_base"], batch
    )
    for term in terms:
        keep = term.keep(batch.sources)
        if (term.function is None and term.name != "kl_to_base") or not bool(keep.any()):
            continue
        part = batch if bool(keep.all()) else batch.select(keep)
        if term.function is not None:
            results[term.name] = _user_term(term, part)
            continue
        count = term.known_count(batch.sources, batch.source_weights)
        if count:
            results[term.name] = (kl_to_base(part), count)
    return results


def every_sum(
    terms: Sequence[Term], batch: LossBatch, *, seen: bool = True
) -> dict[str, tuple[Tensor, float]]:
    """`term_sums`, with a sum of zero for each term that sees no position.

    Where weights are gathered from all ranks, all make as many forwards and backwards: an audit
    runs a backward for each term, and `kl_to_base` a forward of the base.

    Args:
        terms: The resolved terms.
        batch: Trained positions of the micro-batch.
        seen: Whether its positions count at all.

    Returns:
        name -> (sum, count) of each term; a zero has a graph through the whole model.
    """
    found = term_sums(terms, batch) if seen else {}
    for term in terms:
        if term.name not in found:
            if term.name == "kl_to_base" and batch.base is not None:
                batch.base()
            found[term.name] = ((batch.hidden.float() * 0.0).sum(), 0.0)
    return found


def _cross_entropy_terms(
    terms: Sequence[Term], batch: LossBatch
) -> dict[str, tuple[Tensor, float]]:
    """next_token and z_loss share one pass over the logits."""
    counts = {
        term.name: term.known_count(batch.sources, batch.source_weights) or 0.0 for term in terms
    }
    device = batch.hidden.device
    weights = {
        term.name: to_device(batch.host_weights * term.keep(batch.sources), device)
        for term in terms
        if counts[term.name] > 0
    }
    if not weights:
        return {}
    nll_weights = weights.get("next_token", torch.zeros(len(batch), device=device))
    z_weights = weights.get("z_loss")
    if batch.head_weight is not None and batch.head_weight.dtype == batch.hidden.dtype:
        nll, z = linear_cross_entropy(
            batch.hidden, batch.head_weight, batch.labels, nll_weights, z_weights
        )
    else:
        nll, z = head_cross_entropy(
            batch.hidden, batch.head, batch.vocabulary, batch.labels, nll_weights, z_weights
        )
    sums = {"next_token": nll, "z_loss": z}
    return {name: (sums[name], counts[name]) for name in weights}


def kl_to_base(batch: LossBatch) -> Tensor:
    """Weighted sum of KL(tuned || base) over positions, fp32, exact over the vocabulary."""
    weights = batch.weights

    def part_sum(hidden: Tensor, part: slice) -> Tensor:
        tuned = log_softmax(batch.head(hidden).float(), dim=-1)
        base = log_softmax(batch.base_logits(part).float(), dim=-1)
        divergence = (tuned.exp() * (tuned - base)).sum(dim=-1)
        return (divergence * weights[part]).sum()

    return chunked_head_sums(batch.hidden, part_sum, batch.vocabulary)


def _line(error: Exception) -> str:
    """Where in a user's function it was raised; empty where the function was not entered."""
    trace = error.__traceback__
    inside = None if trace is None else trace.tb_next
    if inside is None:
        return ""
    return f" ({Path(inside.tb_frame.f_code.co_filename).name}, line {inside.tb_lineno})"


def _number(count: Any) -> float | None:
    try:
        return float(count)
    except (TypeError, ValueError, RuntimeError):  # None, text, a tensor of several values
        return None


def _user_term(term: Term, batch: LossBatch) -> tuple[Tensor, float]:
    assert term.function is not None
    try:
        result = term.function(batch)
    except torch.OutOfMemoryError:
        raise  # the machine's fault, not the function's
    except Exception as error:
        raise RunError(
            "loss_function_raised",
            f"loss term {term.name!r} raised {type(error).__name__}: {error}{_line(error)}",
            where=term.config.function or "",
            fix="the function takes a LossBatch and returns (sum, count)",
        ) from error
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor)):
        raise RunError(
            "loss_function_result",
            f"loss term {term.name!r} returned {type(result).__name__}, not (sum, count)",
            where=term.config.function or "",
            fix="return a scalar tensor and the number of things summed",
        )
    total, count = result
    if total.dim() != 0 or total.is_complex():
        raise RunError(
            "loss_not_scalar",
            f"loss term {term.name!r} returned a sum of shape {tuple(total.shape)}"
            + (f" and type {total.dtype}" if total.is_complex() else ""),
            where=term.config.function or "",
            fix="sum it to a real scalar",
        )
    number = _number(count)
    if number is None or not 0 <= number < math.inf:  # NaN too
        shown = f"a tensor of shape {tuple(count.shape)}" if isinstance(count, Tensor) else count
        raise RunError(
            "loss_count",
            f"loss term {term.name!r} returned the count {shown if number is None else number}",
            where=term.config.function or "",
            fix="return how many things were summed, 0 where there are none",
        )
    if number and torch.is_grad_enabled() and not total.requires_grad:
        raise RunError(
            "loss_without_graph",
            f"loss term {term.name!r} returned a sum that leads to no trained tensor",
            where=term.config.function or "",
            fix="compute it from batch.hidden or batch.logits(), without detach, item or no_grad",
        )
    return total.float().to(batch.hidden.device), number
