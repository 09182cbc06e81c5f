"""One update: forwards, terms, backward, and what came of it.

Shape letters: R rows of a micro-batch, L tokens of a row, N trained positions, d hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glasstune.adapters.base import base_only
from glasstune.core.batch import IGNORED, MicroBatch
from glasstune.core.protocols import CountsTaker, StepHook
from glasstune.models.families.install import packing_kwargs
from glasstune.models.head import HeadSplit
from glasstune.training.dropout import RowSeeds, mix
from glasstune.training.nonfinite import check_finite
from glasstune.training.terms import LossBatch, Term, term_sums


@dataclass
class AdaptedModel:
    """The PEFT model and how its forwards are run.

    Args:
        model: A PEFT model; its trained tensors are fp32.
        split: The model before and behind its head.
        device: Where it lives.
        autocast: Type of the products, or None where weights and products are fp32.
        vocabulary: Entries of the output head.
        source_weights: `loss_weight` of each data source.
        seed: The run's seed.
        rows: Seeds of the rows in flight, shared with the adapters' dropout.

    Attributes:
        bare_head: Whether the loss may take the head's frozen weight instead of calling the head.
    """

    model: nn.Module
    split: HeadSplit
    device: torch.device
    autocast: torch.dtype | None
    vocabulary: int
    source_weights: Sequence[float]
    seed: int
    rows: RowSeeds = field(default_factory=RowSeeds)
    bare_head: bool = field(init=False)

    def __post_init__(self) -> None:
        # Asked once, before any audit: its hooks on the head only look, and must not choose
        # another way to the loss, which would be another rounding.
        self.bare_head = self.split.bare

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context of every forward."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Runs the backbone; returns its output, float [R, L, d].

        Where the model has no proven split before its head, these are its logits, [R, L, V].
        """
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.input_ids).to(self.device, non_blocking=True),
            "use_cache": False,
        }
        if batch.packed:
            positions = torch.from_numpy(batch.position_ids)
            inputs["position_ids"] = positions.to(self.device, non_blocking=True)
            inputs.update(packing_kwargs(self.model, batch.bounds, self.device))
        else:
            mask = torch.from_numpy(batch.attention_mask)
            inputs["attention_mask"] = mask.to(self.device, non_blocking=True)
        if self.split.proven:
            return self.split.hidden(self.model, **inputs)
        return self.split.full_logits(self.model, **inputs)

    def head(self, hidden: Tensor) -> Tensor:
        """Maps `hidden`'s output to logits; the identity where the model has no proven split."""
        return self.split.logits(hidden) if self.split.proven else hidden

    def trained_hidden(self, batch: MicroBatch, epoch: int) -> Tensor:
        """Backbone output at the trained positions, [N, d], under this batch's own seeds."""
        self.rows.seed, self.rows.epoch, self.rows.position = self.seed, epoch, batch.position
        # The base model's own dropout draws from the global stream: the same for the same rows.
        torch.manual_seed(mix(self.seed, epoch, batch.position, "base"))
        hidden_RLd = self.hidden(batch)
        index_N = torch.from_numpy(batch.targets.reshape(-1) != IGNORED).nonzero().squeeze(-1)
        return hidden_RLd.flatten(0, 1)[index_N.to(self.device, non_blocking=True)]

    def loss_batch(self, batch: MicroBatch, step: int, epoch: int) -> LossBatch:
        """Runs the forward and gathers what the terms need."""
        flat = batch.targets.reshape(-1)
        trained = flat != IGNORED
        documents = torch.from_numpy(batch.document_ids.reshape(-1)[trained]).long()
        source_of = torch.tensor([document.source for document in batch.documents])

        @functools.cache
        def base() -> Tensor:
            with torch.no_grad(), base_only(self.model), self.precision():
                return self.trained_hidden(batch, epoch)

        hidden_Nd = self.trained_hidden(batch, epoch)
        names = sorted({name for document in batch.documents for name in document.columns})
        return LossBatch(
            hidden=hidden_Nd,
            labels=torch.from_numpy(flat[trained]).to(self.device, non_blocking=True),
            documents=documents.to(self.device, non_blocking=True),
            sources=source_of[documents],
            source_weights=self.source_weights,
            columns={name: [doc.columns.get(name) for doc in batch.documents] for name in names},
            step=step,
            vocabulary=self.vocabulary,
            head=self.head,
            head_weight=self.split.weight if self.bare_head else None,
            base=base,
            adapters_off=lambda: base_only(self.model),
        )


@dataclass
class UpdateResult:
    """What one update computed, before the optimiser moves.

    Args:
        loss: Σ weight · sum / count.
        losses: Per term sum / count; None where the term saw nothing.
        tokens: Real tokens that went through the model.
        trained_tokens: Positions with a target.
        grad_norm: Norm of all gradients before clipping.
    """

    loss: float
    losses: dict[str, float | None]
    tokens: int
    trained_tokens: int
    grad_norm: float = 0.0


def update_counts(
    adapted: AdaptedModel,
    terms: Sequence[Term],
    batches: Sequence[MicroBatch],
    step: int,
    epoch: int,
) -> dict[str, float] | None:
    """Counts of each term over the whole update, known before the first backward.

    Built-in terms count labels. A user's function is the only one who knows its count: with one
    micro-batch it is taken from the result itself (None is returned); with several, the function
    is run once more before, without gradients.
    """
    unknown = [term for term in terms if term.function is not None]
    if unknown and len(batches) == 1:
        return None
    counts = {term.name: 0.0 for term in terms}
    for batch in batches:
        sources = trained_sources(batch)
        for term in terms:
            counts[term.name] += term.known_count(sources, adapted.source_weights) or 0.0
        if unknown:
            with torch.no_grad(), adapted.precision():
                seen = term_sums(unknown, adapted.loss_batch(batch, step, epoch))
            for name, (_, count) in seen.items():
                counts[name] += count
    return counts


def trained_sources(batch: MicroBatch) -> Tensor:
    """Source index of each trained position, int64 [N] on the CPU."""
    documents = batch.document_ids.reshape(-1)[batch.targets.reshape(-1) != IGNORED]
    source_of = torch.tensor([document.source for document in batch.documents])
    return source_of[torch.from_numpy(documents).long()]


def compute_update(
    adapted: AdaptedModel,
    terms: Sequence[Term],
    batches: Sequence[MicroBatch],
    step: int,
    epoch: int,
    hooks: Sequence[StepHook] = (),
    *,
    counting: CountsTaker | None = None,
    check: bool = True,
) -> UpdateResult | None:
    """Forwards and backwards of one update; gradients are left in `.grad`.

    Args:
        adapted: The model.
        terms: Loss terms.
        batches: The update's micro-batches; any split of the same rows gives the same sums.
        step: 1-based number of the update.
        epoch: 0-based epoch.
        hooks: Called before each backward with the terms.
        counting: Told the counts of the whole update before its first backward.
        check: Whether a sum that is not finite stops.

    Returns:
        The result, or None where the update has no trained token (then no gradient was made).

    Raises:
        NonFinite: A sum is not finite; names term and rows.
    """
    counts = update_counts(adapted, terms, batches, step, epoch)
    if counts is not None and not any(counts.values()):
        return None
    sums: list[tuple[int, str, Tensor]] = []
    for index, batch in enumerate(batches):
        with adapted.precision():
            found = term_sums(terms, adapted.loss_batch(batch, step, epoch))
        if counts is None:  # one micro-batch: its counts are the update's
            counts = {name: count for name, (_, count) in found.items()}
        scaled = {
            term.name: (term.config.weight_at(step) / counts[term.name], found[term.name][0])
            for term in terms
            if term.name in found and counts[term.name] > 0
        }
        if not scaled:
            continue
        if counting is not None and not sums:
            counting.take_counts(step, counts)
        for hook in hooks:
            hook.before_backward(step, scaled, batch)
        # A user's sum over nothing may have no graph.
        parts = [scale * value for scale, value in scaled.values() if value.requires_grad]
        if parts:
            torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
        sums.extend((index, name, value.detach()) for name, (_, value) in scaled.items())
    if not sums:
        return None
    assert counts is not None
    values = torch.stack([value for _, _, value in sums]).tolist()  # the update's one host copy
    if check:
        check_finite(adapted, terms, batches, sums, values, step, epoch)
    totals = {term.name: 0.0 for term in terms}
    for (_, name, _), value in zip(sums, values, strict=True):
        totals[name] += value
    losses = {name: totals[name] / counts[name] if counts.get(name) else None for name in totals}
    loss = sum(term.config.weight_at(step) * (losses[term.name] or 0.0) for term in terms)
    return UpdateResult(
        loss=loss,
        losses=losses,
        tokens=sum(batch.tokens for batch in batches),
        trained_tokens=sum(batch.trained_tokens for batch in batches),
    )
