"""Other ways to run the same rows, and the ways out where none fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from glasstune.core.errors import InputError
from glasstune.core.plan import Alternative
from glasstune.core.recompute import Recompute
from glasstune.core.units import format_bytes, format_bytes_up

if TYPE_CHECKING:
    from glasstune.planner.choose import Option
    from glasstune.workflows.plan_work import Work

SWING = 16 * 2**20
"""Bytes by which Python itself, with its libraries and data, may differ between two starts of one
command: under 1 MiB was seen."""

_WAYS = 2
_SHORTEST = 64
"""Tokens; shorter rows are no advice."""


def alternatives(work: Work, chosen: Option, rows: int) -> list[Alternative]:
    """Returns other policies, rows of a forward and lengths, those that fit first."""
    from glasstune.planner.choose import policy_name

    schedule, longest = work.prepared.schedule, work.batch.length
    found: list[Alternative] = []

    def add(change: dict[str, Any], recompute: Recompute, count: int, length: int) -> None:
        peak = work.peak(count, recompute, length).bytes
        seconds = work.seconds(count, recompute, length)
        total = seconds * work.total + work.evaluation_seconds(count)
        found.append(Alternative(change, peak, total, peak <= work.limit, seconds))

    layers = work.model.layers
    for policy in (Recompute(0), Recompute(layers), Recompute(layers, offload=True)):
        cuda = work.device.kind == "cuda"
        if policy != chosen.recompute and layers and (cuda or not policy.offload):
            name = policy_name(policy, layers)
            add({"training.recompute": name}, policy, rows, longest)
    for count in sorted({rows * 2, rows // 2, 1} - {rows, 0}):
        if count <= schedule.batch:
            key = "training.per_device_train_batch_size"
            add({key: count}, chosen.recompute, count, longest)
    for length in _lengths(work):
        add({"data.max_length": length}, chosen.recompute, rows, length)
    return sorted(found, key=in_order)


def in_order(item: Alternative) -> tuple[bool, float]:
    """Sorts what fits first, the fastest of each kind before others."""
    return not item.fits, item.total_seconds


def _lengths(work: Work) -> list[int]:
    """Returns other values of `data.max_length` that make the longest row another.

    Longer rows come only where the limit makes them what they are and the model has positions.
    """
    from glasstune.models.facts import model_facts

    longest = work.batch.length
    found = [longest // 2] if longest // 2 >= _SHORTEST else []
    positions = model_facts(work.prepared.resolved.config).max_positions
    if longest >= work.config.data.max_length and (positions is None or longest * 2 <= positions):
        found.append(longest * 2)
    return found


@dataclass(frozen=True)
class _Change:
    """Another configuration, as far as a plan depends on it.

    Args:
        words: Its keys and values, as they are written.
        bits: Of the base, None for its own.
        recompute: `training.recompute`, likewise.
        rows: Rows of a forward, likewise.
        length: Longest row, likewise.
    """

    words: str
    bits: Literal[4] | None = None
    recompute: Literal["auto"] | None = None
    rows: int | None = None
    length: int | None = None

    def and_also(self, other: _Change) -> _Change:
        """Returns both at once."""
        return _Change(
            f"{self.words} with {other.words}", self.bits or other.bits,
            self.recompute or other.recompute, self.rows or other.rows,
            self.length or other.length,
        )  # fmt: skip

    def needs(self, work: Work) -> int | None:
        """Plans it anew; returns the least bytes it takes, or None where it cannot be."""
        config, prepared = work.config, work.prepared
        if self.bits is not None:
            model = config.model.model_copy(update={"bits": self.bits})
            config = config.model_copy(update={"model": model})
        if self.recompute is not None:
            training = config.training.model_copy(update={"recompute": self.recompute})
            config = config.model_copy(update={"training": training})
        schedule = prepared.schedule
        if self.rows is not None:
            schedule = replace(schedule, micro=self.rows)
        try:
            other = work.changed(replace(prepared, config=config, schedule=schedule), self.length)
            return other.least_option()[0].peak
        except InputError:  # options of this base that another one does not take
            return None


def refusal(work: Work) -> InputError:
    """Returns the error of a run that does not fit: its bytes, and three ways out."""
    least, smallest = work.least_option()
    moment = work.peak(smallest, least.recompute)
    parts = ", ".join(
        f"{name} {format_bytes(size)}"
        for name, size in sorted(moment.parts.items(), key=lambda item: -item[1])[:3]
    )
    # Another start may fit a whole base on fewer devices: then nobody reads the ways out.
    ways = [] if work.prepared.may_shard else _ways_out(work, smallest)
    return InputError(
        "does_not_fit",
        f"the run needs {format_bytes_up(least.peak)} at its {moment.phase} ({parts}), and "
        f"{format_bytes(work.limit)} may be used ({work.limit_reason})",
        where="training.max_memory" if work.config.training.max_memory else "model.path",
        fix="; or ".join([*ways, _more_memory(work, least.peak)]),
    )


def _ways_out(work: Work, rows: int) -> list[str]:
    """Two ways, each with its number: those that are enough, alone or several at once."""
    singles = _changes(work, rows)
    enough: list[tuple[str, int]] = []
    short: list[tuple[str, int]] = []

    def tried(change: _Change) -> bool:
        needed = change.needs(work)
        if needed is not None:
            (enough if needed <= work.limit else short).append((change.words, needed))
        return needed is not None and needed <= work.limit

    for change in singles:
        tried(change)
    if len(enough) < _WAYS and len(singles) > 1:
        together = singles[0]
        for change in singles[1:]:
            together = together.and_also(change)
            if tried(together) or len(enough) >= _WAYS:
                break
    found = [f"{words} ({format_bytes(needed)})" for words, needed in enough[:_WAYS]]
    short.sort(key=lambda item: item[1])
    for words, needed in short[: _WAYS - len(found)]:
        found.append(f"{words} ({format_bytes(needed)}, still too much)")
    return [*found, "a smaller base model", "a smaller adapter.r"][:_WAYS]


def _changes(work: Work, rows: int) -> list[_Change]:
    """Returns what may be changed, the least loss first."""
    config, found = work.config, list[_Change]()
    if config.training.recompute != "auto":
        found.append(_Change("training.recompute: auto", recompute="auto"))
    if rows > 1:
        found.append(_Change("training.per_device_train_batch_size: 1", rows=1))
    if config.model.bits > 4:
        found.append(_Change("model.bits: 4", bits=4))
    length = work.batch.length // 2
    if length >= _SHORTEST and (lost := _longer(work, length)) is not None:
        gone = "" if config.data.truncation == "cut" else f", which drops {lost:.0%} of the rows"
        found.append(_Change(f"data.max_length: {length}{gone if lost else ''}", length=length))
    return found


def _longer(work: Work, length: int) -> float | None:
    """Returns the share of training rows that are longer; None where some set has no others."""
    shares = []
    for data in (work.prepared.data.train, work.prepared.data.validation):
        if data is not None:
            longer = sum(len(document) > length for document in data.documents)
            shares.append(longer / max(1, len(data.documents)))
    if work.config.data.truncation != "cut" and max(shares) == 1:
        return None
    return shares[0]


def _more_memory(work: Work, needed: int) -> str:
    """The last way out: more memory, so much that the same run is not refused again."""
    size = format_bytes_up(needed + (SWING if work.device.kind == "cpu" else 0))
    if work.config.training.max_memory is not None:
        return f"training.max_memory: {size} and more, where a device has it"
    return f"a device with {size} and more free"
