"""One update: forwards, terms, backward, and what came of it.

Shape letters: R rows of a micro-batch, L tokens of a row, N trained positions, d hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glasstune.adapters.base import base_only
from glasstune.core.batch import IGNORED, MicroBatch
from glasstune.core.protocols import CountsTaker, StepHook
from glasstune.core.speed import SpeedRecord
from glasstune.fast.report import SpeedReport
from glasstune.fast.speed_up import plain
from glasstune.models.families.install import packing_kwargs, padded_kwargs
from glasstune.models.head import HeadSplit
from glasstune.training.distributed import ALONE, World
from glasstune.training.dropout import RowSeeds, mix
from glasstune.training.inputs import FixedShape, Inputs, inputs_of, to_device
from glasstune.training.nonfinite import check_finite
from glasstune.training.replay import Replays
from glasstune.training.terms import LossBatch, Term, every_sum, term_sums


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
        shape: What packed batches are padded to where blocks are compiled.
        speed: What `speed_up` did, where it was used.
        speed_record: How each adapted module is computed.
        replays: Replays forwards where a GPU would wait for their kernels.
        after: What else is undone with it.
        filler: Where weights are gathered from all ranks for each forward: what a rank runs that
            has fewer rows than another. None where every rank holds them.

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
    shape: FixedShape | None = None
    speed: SpeedReport | None = None
    speed_record: SpeedRecord | None = None
    replays: Replays | None = None
    after: list[Callable[[], object]] = field(default_factory=list)
    filler: MicroBatch | None = None
    bare_head: bool = field(init=False)

    def __post_init__(self) -> None:
        # Asked once, before any audit: its hooks on the head only look, and must not choose
        # another way to the loss, which would be another rounding.
        self.bare_head = self.split.bare

    @property
    def compiled(self) -> bool:
        """Whether compiled regions hide the calls inside them."""
        return self.speed_record is not None and bool(self.speed_record.compiled)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the base."""
        return self.filler is not None

    def keep_step(self, forwards: int) -> None:
        """Runs forwards without gradients that other ranks need this one for."""
        assert self.filler is not None
        for _ in range(forwards):
            with torch.no_grad(), self.precision():
                self.trained_hidden(self.filler, 0)

    def slow_down(self) -> None:
        """Takes back what was sped up, and torch's settings with it."""
        self.replays = None
        if self.speed is not None:
            self.speed.undo()
        while self.after:
            self.after.pop()()

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast context of every forward."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Runs the backbone; returns its output, float [R, L, d].

        Where the model has no proven split before its head, these are its logits, [R, L, V]. R
        and L are those of `shape`.
        """
        return self._hidden(inputs_of(batch, self.shape), batch.packed)

    def _hidden(self, given: Inputs, packed: bool) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": self._there(given.input_ids), "use_cache": False}
        if packed:
            inputs["position_ids"] = self._there(given.position_ids)
            inputs.update(packing_kwargs(self.model, given.bounds, self.device))
        else:
            inputs.update(padded_kwargs(self.model, self._there(given.attention_mask)))
        return (
            self._backbone(inputs) if self.replays is None else self.replays(self._backbone, inputs)
        )

    def _backbone(self, inputs: Mapping[str, Any]) -> Tensor:
        if self.split.proven:
            return self.split.hidden(self.model, **inputs)
        return self.split.full_logits(self.model, **inputs)

    def _there(self, values: NDArray[Any]) -> Tensor:
        return to_device(torch.from_numpy(values), self.device)

    def head(self, hidden: Tensor) -> Tensor:
        """Maps `hidden`'s output to logits; the identity where the model has no proven split."""
        return self.split.logits(hidden) if self.split.proven else hidden

    def trained_hidden(self, batch: MicroBatch, epoch: int) -> Tensor:
        """Backbone output at the trained positions, [N, d], under this batch's own seeds."""
        given = inputs_of(batch, self.shape)
        self.rows.place(self.seed, epoch, batch.position, given.rows, self.device)
        # The base model's own dropout draws from the global stream: the same for the same rows.
        torch.manual_seed(mix(self.seed, epoch, batch.position, "base"))
        hidden_RLd = self._hidden(given, batch.packed)
        return hidden_RLd.flatten(0, 1).index_select(0, self._there(given.trained))

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
            labels=self._there(flat[trained]),
            documents=to_device(documents, self.device),
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


def run_plainly(
    adapted: AdaptedModel, terms: Sequence[Term], batches: Sequence[MicroBatch]
) -> None:
    """Runs the forwards of an update without gradients as PEFT alone would, for who watches calls.

    Args:
        adapted: The model.
        terms: Loss terms.
        batches: The update's micro-batches; of the epoch in flight. Where weights are gathered
            for each forward, all ranks give as many.
    """
    sums = every_sum if adapted.sharded else term_sums
    with torch.no_grad(), plain(adapted.model), adapted.precision():
        for batch in batches:
            sums(terms, adapted.loss_batch(batch, 1, adapted.rows.epoch))


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
    world: World = ALONE,
) -> dict[str, float] | None:
    """Counts of each term over the whole update and all ranks, known before the first backward.

    Built-in terms count labels. A user's function is the only one who knows its count: with one
    micro-batch in all it is taken from the result itself (None is returned); with several, the
    function is run once more before, without gradients.
    """
    unknown = [term for term in terms if term.function is not None]
    if unknown and len(batches) == 1 and world.size == 1:
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
    return dict(zip(counts, world.sum(list(counts.values())), strict=True))


def trained_sources(batch: MicroBatch) -> Tensor:
    """Source index of each trained position, int64 [N] on the CPU."""
    documents = batch.document_ids.reshape(-1)[batch.targets.reshape(-1) != IGNORED]
    source_of = torch.tensor([document.source for document in batch.documents])
    return source_of[torch.from_numpy(documents).long()]


@dataclass
class Launched:
    """An update whose backward is under way: its sums are still on the device.

    Args:
        adapted: The model.
        terms: All terms.
        batches: Its micro-batches.
        step: 1-based number of the update.
        epoch: 0-based epoch.
        counts: Of each term over the whole update.
        parts: (index of the micro-batch, name of the term) of each sum.
        sums: fp32 [K] on the device.
    """

    adapted: AdaptedModel
    terms: Sequence[Term]
    batches: Sequence[MicroBatch]
    step: int
    epoch: int
    counts: dict[str, float]
    parts: list[tuple[int, str]]
    sums: Tensor

    def per_term(self) -> Tensor:
        """Sums of each term over this rank's micro-batches, fp32 [terms] on the device."""
        found = torch.zeros(len(self.terms), device=self.sums.device)
        place = {term.name: index for index, term in enumerate(self.terms)}
        index = torch.tensor([place[name] for _, name in self.parts], dtype=torch.long)
        return found.index_add_(0, to_device(index, found.device), self.sums.float())

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens and trained tokens of this rank's micro-batches."""
        tokens = sum(batch.tokens for batch in self.batches)
        return tokens, sum(batch.trained_tokens for batch in self.batches)

    def read(
        self,
        sums: Sequence[float],
        *,
        check: bool = True,
        all_ranks: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> UpdateResult:
        """Makes the result.

        Args:
            sums: The sums on the host.
            check: Whether a sum that is not finite stops.
            all_ranks: `per_term` and `sizes` over all ranks, where there are several.

        Raises:
            NonFinite: A sum is not finite; names term and rows.
        """
        if check:
            check_finite(
                self.adapted, self.terms, self.batches, self.parts, sums, self.step, self.epoch
            )
        counts, totals = self.counts, {term.name: 0.0 for term in self.terms}
        for (_, name), value in zip(self.parts, sums, strict=True):
            totals[name] += value
        tokens, trained_tokens = self.sizes
        if all_ranks is not None:
            totals = dict(zip(totals, all_ranks[0], strict=True))
            tokens, trained_tokens = map(int, all_ranks[1])
        losses = {
            name: totals[name] / counts[name] if counts.get(name) else None for name in totals
        }
        loss = sum(
            term.config.weight_at(self.step) * (losses[term.name] or 0.0) for term in self.terms
        )
        return UpdateResult(loss=loss, losses=losses, tokens=tokens, trained_tokens=trained_tokens)


def launch_update(
    adapted: AdaptedModel,
    terms: Sequence[Term],
    batches: Sequence[MicroBatch],
    step: int,
    epoch: int,
    hooks: Sequence[StepHook] = (),
    *,
    counting: CountsTaker | None = None,
    world: World = ALONE,
    forwards: int = 0,
) -> Launched | None:
    """Forwards and backwards of one update, without waiting for a GPU.

    With several ranks, gradients and sums are those of this rank's rows, divided by the counts of
    all; the caller adds them up (`World.reduce_update`).

    Args:
        adapted: The model.
        terms: Loss terms.
        batches: The update's micro-batches; any split of the same rows gives the same sums.
        step: 1-based number of the update.
        epoch: 0-based epoch.
        hooks: Called before each backward with the terms.
        counting: Told the counts of the whole update before its first backward.
        world: The ranks that share the update.
        forwards: Of the rank that has most, where weights are gathered for each.

    Returns:
        The update, whose gradients are left in `.grad`, or None where it has no trained token on
        any rank (then no gradient was made).
    """
    counts = update_counts(adapted, terms, batches, step, epoch, world)
    if counts is not None and not any(counts.values()):
        return None
    fillers = [] if adapted.filler is None else [adapted.filler] * (forwards - len(batches))
    sums: list[tuple[int, str, Tensor]] = []
    for index, batch in enumerate([*batches, *fillers]):
        with adapted.precision():
            given = adapted.loss_batch(batch, step, epoch)
            if adapted.sharded:  # all ranks make as many forwards and backwards
                found = every_sum(terms, given, seen=index < len(batches))
            else:
                found = term_sums(terms, given)
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
    if not sums and world.size == 1:
        return None
    assert counts is not None
    values = [value for _, _, value in sums]
    return Launched(
        adapted, terms, batches, step, epoch, counts,
        [(index, name) for index, name, _ in sums],
        torch.stack(values) if values else torch.zeros(0, device=adapted.device),
    )  # fmt: skip


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
    """`launch_update`, waited for.

    Args:
        adapted: The model.
        terms: Loss terms.
        batches: The update's micro-batches.
        step: 1-based number of the update.
        epoch: 0-based epoch.
        hooks: Called before each backward with the terms.
        counting: Told the counts of the whole update before its first backward.
        check: Whether a sum that is not finite stops.

    Returns:
        The result, or None where the update has no trained token.

    Raises:
        NonFinite: A sum is not finite; names term and rows.
    """
    launched = launch_update(adapted, terms, batches, step, epoch, hooks, counting=counting)
    return None if launched is None else launched.read(launched.sums.tolist(), check=check)
