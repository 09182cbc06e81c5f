"""Compares a merged model, read back from the disk, with its base and adapter apart.

Every forward streams: one layer's weights are in memory at a time. The model with its adapter
runs PEFT's own forward on the base's own files, so nothing of the merge's arithmetic is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from glasstune.core.protocols import Progress
from glasstune.export.distance import Distance, LogitFile, logit_file
from glasstune.export.merge_plan import MergePlan
from glasstune.export.prompts import Prompts
from glasstune.export.read_bar import ReadBar
from glasstune.models.conversion import tied_sources
from glasstune.models.empty import empty_model, float32_names
from glasstune.models.reader import WeightReader
from glasstune.models.resolve import resolve_model
from glasstune.models.streaming import StreamedModel, module_paths
from glasstune.models.training_base import TrainingBase

GREEDY_TOKENS = 8
_GREEDY_BYTES = 16e9
"""Bytes that may be read for the greedy answers: each token reads the whole base once."""

_TASK = "certificate"


@dataclass(frozen=True)
class Measured:
    """What the comparison gave.

    Args:
        merge: Base and adapter apart against the merged model.
        rounding: The merged model in float32 against itself in its own type; None for float32.
        base_kl_mean: As trained against the same adapter on the original; None without a run.
        greedy_agreement: Share of generic prompts continued alike.
        greedy_tokens: Tokens of such a continuation.
        tokens: Tokens compared.
        worst_row: Index of the row with the largest KL, held-out rows first.
    """

    merge: Distance
    rounding: Distance | None
    base_kl_mean: float | None
    greedy_agreement: float
    greedy_tokens: int
    tokens: int
    worst_row: int


def measure(
    plan: MergePlan,
    folder: Path,
    prompts: Prompts,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Runs both models, and what the training's precision and the output's type cost.

    Args:
        plan: The merge.
        folder: The merged model on the disk.
        prompts: Token ids; at least one row.
        device: Where layers run; the CPU by default.
        progress: Shows the megabytes read.

    Raises:
        InputError: The written folder cannot be read back.
        RunError: `head_not_found`.
    """
    size = sum(place.size for place in plan.reader.places.values()) + _tied_bytes(plan)
    steps = max(1, min(GREEDY_TOKENS, int(_GREEDY_BYTES // max(size, 1))))
    steps = steps if prompts.generic else 0
    half = plan.job.dtype != "float32"
    other = _other_base(plan)
    passes = steps + 1 + (1 if other is not None else 0)
    again = (2 if half else 1) * (plan.bytes + (_tied_bytes(plan) if plan.tied == "kept" else 0))
    bar = ReadBar(progress, _TASK, passes * size + again)
    try:
        with logit_file(folder) as apart, logit_file(folder) as merged:
            streamed = _adapted(plan, plan.base_value, device, bar)
            try:
                generic = _continued(streamed, prompts.generic, steps)
                rows = [*prompts.held_out, *generic]
                _drain(apart.keep(streamed.logits(streamed.hidden(rows))))
            finally:
                streamed.close()
            distance = Distance()
            _merged(plan, folder, rows, apart, merged, distance, device, bar)
            rounding = Distance() if half else None
            if rounding is not None:
                _merged_half(plan, folder, rows, merged, rounding, device, bar)
            base = _base_distance(plan, other, rows, apart, device, bar)
    finally:
        bar.finish()
    lengths = [len(row) for row in rows]
    return Measured(
        merge=distance,
        rounding=rounding,
        base_kl_mean=base,
        greedy_agreement=_greedy_agreement(distance, lengths, len(prompts.held_out), steps),
        greedy_tokens=steps,
        tokens=sum(lengths),
        worst_row=_row_of(max(range(len(distance.kl)), key=distance.kl.__getitem__), lengths),
    )


def _tied_bytes(plan: MergePlan) -> int:
    """Bytes that each forward reads twice: a tied weight serves two modules."""
    shared = tied_sources(plan.model)
    groups = [plan.reader.map.by_weight.get(source) for source in shared.values()]
    return sum(plan.reader.places[key].size for group in groups if group for key in group.keys)


class _Other:
    """The base that the adapter was not added to."""

    def __init__(self, expand: TrainingBase | None, trained: bool) -> None:
        self.expand, self.trained = expand, trained


def _other_base(plan: MergePlan) -> _Other | None:
    """Returns the other of original and training's base where they differ, else None."""
    if plan.training is None:
        return None
    stored = {
        name: getattr(torch, plan.reader.places[group.keys[0]].dtype)
        for group in plan.reader.map.groups
        for name in group.weights
    }
    if not any(plan.training.changes(name, dtype) for name, dtype in stored.items()):
        return None
    if plan.job.onto == "training":
        return _Other(None, trained=False)
    return _Other(plan.training, trained=True)


def _adapted(
    plan: MergePlan, expand: TrainingBase | None, device: torch.device | None, bar: ReadBar
) -> StreamedModel:
    return StreamedModel(
        plan.attached.model,
        plan.paths,
        lambda names: plan.fetch(names, expand),
        device=device,
        whole=plan.attached.whole,
        unread=plan.attached.unread,
        on_read=bar.advance,
    )


def _continued(
    streamed: StreamedModel, prompts: Sequence[list[int]], steps: int
) -> list[list[int]]:
    """Appends the most likely tokens to each prompt, one pass over all of them a token."""
    rows = [list(row) for row in prompts]
    for _ in range(steps):
        last = [state[-1:] for state in streamed.hidden(rows)]
        chosen = torch.cat([part.argmax(dim=1) for part in streamed.logits(last)])
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.append(token)
    return rows


def _open_merged(plan: MergePlan, folder: Path) -> tuple[nn.Module, WeightReader]:
    """Opens the output by its own config and files, knowing nothing of the merge."""
    resolved = resolve_model(str(folder), trust_remote_code=plan.job.resolved.trust_remote_code)
    model = empty_model(resolved.config, trust_remote_code=resolved.trust_remote_code)
    return model, WeightReader(folder, model)


def _merged(
    plan: MergePlan, folder: Path, rows: Sequence[list[int]], apart: LogitFile, kept: LogitFile,
    distance: Distance, device: torch.device | None, bar: ReadBar,
) -> None:  # fmt: skip
    model, reader = _open_merged(plan, folder)
    streamed = StreamedModel(
        model, module_paths(model), reader.fetch, device=device, on_read=bar.advance
    )
    try:
        logits = kept.keep(streamed.logits(streamed.hidden(rows)))
        for ours, theirs in zip(logits, apart.read(), strict=True):
            distance.add(theirs, ours)
    finally:
        streamed.close()


def _merged_half(
    plan: MergePlan, folder: Path, rows: Sequence[list[int]], kept: LogitFile,
    rounding: Distance, device: torch.device | None, bar: ReadBar,
) -> None:  # fmt: skip
    model, reader = _open_merged(plan, folder)
    dtype: torch.dtype = getattr(torch, plan.job.dtype)
    streamed = StreamedModel(
        model, module_paths(model), reader.fetch, dtype=dtype, device=device,
        keep_float32=float32_names(model, list(model.state_dict()), dtype), on_read=bar.advance,
    )  # fmt: skip
    try:
        logits = streamed.logits(streamed.hidden(rows))
        for ours, theirs in zip(logits, kept.read(), strict=True):
            rounding.add(theirs, ours)
    finally:
        streamed.close()


def _base_distance(
    plan: MergePlan, other: _Other | None, rows: Sequence[list[int]], apart: LogitFile,
    device: torch.device | None, bar: ReadBar,
) -> float | None:  # fmt: skip
    if plan.training is None:
        return None
    if other is None:
        return 0.0
    distance = Distance()
    streamed = _adapted(plan, other.expand, device, bar)
    try:
        logits = streamed.logits(streamed.hidden(rows))
        for theirs, target in zip(logits, apart.read(), strict=True):
            distance.add(*((theirs, target) if other.trained else (target, theirs)))
    finally:
        streamed.close()
    return distance.mean


def _greedy_agreement(
    distance: Distance, lengths: Sequence[int], held_out: int, steps: int
) -> float:
    """Share of the continued rows on whose continuation both agree at every token.

    The reference's own choices were appended, so the merged model writes the same answer exactly
    where it chooses the same at each of them.
    """
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))][held_out:]
    if not ends or not steps:
        return 1.0
    alike = [all(distance.agree[end - 1 - steps : end - 1]) for end in ends]
    return sum(alike) / len(alike)


def _row_of(token: int, lengths: Sequence[int]) -> int:
    for index, length in enumerate(lengths):
        if token < length:
            return index
        token -= length
    raise IndexError(token)


def _drain(chunks: Iterable[object]) -> None:
    for _ in chunks:
        pass
