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
from glasstune.core.batch import IGNORED, Document, MicroBatch
from glasstune.core.errors import RunError
from glasstune.core.protocols import StepHook
from glasstune.models.families.install import packing_kwargs
from glasstune.models.head import HeadSplit
from glasstune.training.dropout import RowSeeds, mix
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
    """

    model: nn.Module
    split: HeadSplit
    device: torch.device
    autocast: torch.dtype | None
    vocabulary: int
    source_weights: Sequence[float]
    seed: int
    rows: RowSeeds = field(default_factory=RowSeeds)

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
            head_weight=self.split.weight if self.split.bare else None,
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
) -> UpdateResult | None:
    """Forwards and backwards of one update; gradients are left in `.grad`.

    Args:
        adapted: The model.
        terms: Loss terms.
        batches: The update's micro-batches; any split of the same rows gives the same sums.
        step: 1-based number of the update.
        epoch: 0-based epoch.
        hooks: Called before each backward with the terms.

    Returns:
        The result, or None where the update has no trained token (then no gradient was made).

    Raises:
        RunError: A sum is not finite; names term and rows.
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


def check_finite(
    adapted: AdaptedModel,
    terms: Sequence[Term],
    batches: Sequence[MicroBatch],
    sums: Sequence[tuple[int, str, Tensor]],
    values: Sequence[float],
    step: int,
    epoch: int,
) -> None:
    """Stops at the first sum that is not finite.

    Raises:
        RunError: `non_finite_loss`, naming step, term and the rows that cause it.
    """
    for (index, name, _), value in zip(sums, values, strict=True):
        if value == value and abs(value) != float("inf"):
            continue
        guilty = guilty_documents(
            adapted, [t for t in terms if t.name == name], batches[index], step, epoch
        )
        origins = ", ".join(document.origin or "?" for document in guilty[:8])
        more = f" and {len(guilty) - 8} more" if len(guilty) > 8 else ""
        everywhere = len(guilty) == len(batches[index].documents)
        raise RunError(
            "non_finite_loss",
            f"loss term {name!r} is {value} at step {step}; rows: {origins}{more}",
            where=f"step {step}",
            fix=(
                "every row of the batch gives it: look at the learning rate and the precision"
                if everywhere
                else "look at these rows, or lower the learning rate"
            )
            + " (the last good checkpoint is kept)",
        )


def guilty_documents(
    adapted: AdaptedModel, terms: Sequence[Term], batch: MicroBatch, step: int, epoch: int
) -> list[Document]:
    """Replays each document of a bad micro-batch alone; returns those that are not finite.

    Where none is bad alone, all of them are returned: the fault needs the whole batch.
    """
    guilty: list[Document] = []
    for document in batch.documents:
        with torch.no_grad(), adapted.precision():
            alone = adapted.loss_batch(single_document(document, batch.position), step, epoch)
            sums = term_sums(terms, alone)
        if any(not bool(torch.isfinite(value)) for value, _ in sums.values()):
            guilty.append(document)
    return guilty or list(batch.documents)


def single_document(document: Document, position: int) -> MicroBatch:
    """A micro-batch of one document in one row."""
    import numpy as np

    length = len(document)
    targets = np.full((1, length), IGNORED, dtype=np.int64)
    targets[0, :-1] = document.labels[1:]
    return MicroBatch(
        input_ids=document.ids.astype(np.int64)[None],
        position_ids=np.arange(length, dtype=np.int64)[None],
        targets=targets,
        document_ids=np.zeros((1, length), dtype=np.int32),
        bounds=((0, length),),
        documents=(document,),
        position=position,
        packed=False,
    )
