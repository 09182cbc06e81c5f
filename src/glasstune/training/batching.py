"""How rows become updates: sizes, counts and the order of micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glasstune.core.batch import MicroBatch
from glasstune.core.choices import Choices
from glasstune.core.config import Config, TrainingConfig
from glasstune.data.loader import batches_at
from glasstune.data.packing import PackedSet

# Tokens of one forward while the memory plan is not asked. A 2-core CPU gained nothing beyond
# 2,048; an H100 is full at 8,192.
TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 8192}


# A few hundred short rows fill few packs: at 16 packs an update, 500 rows would give 5 updates an
# epoch, too few for any learning rate.
UPDATES_PER_EPOCH = 16
EVALUATIONS = 5
_BATCH_KEYS = {
    "train_batch_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}


@dataclass(frozen=True)
class Schedule:
    """Updates of a run.

    Args:
        rows: Packs (or documents) of an epoch.
        batch: Rows of one update.
        micro: Rows of one forward.
        epochs: Passes, possibly with a fraction.
        max_steps: Upper bound on updates, or -1.
        rank: This process.
        ranks: Processes that share each update.
    """

    rows: int
    batch: int
    micro: int
    epochs: float
    max_steps: int
    rank: int = 0
    ranks: int = 1

    def epoch_rows(self, epoch: int) -> int:
        """Rows of an epoch; the last one may be a fraction; 0 past the end."""
        if self.max_steps > 0:
            return self.rows
        share = min(1.0, max(0.0, self.epochs - epoch))
        return math.ceil(share * self.rows - 1e-9)

    @property
    def updates_per_epoch(self) -> int:
        """Updates of a whole epoch; the last one may be short."""
        return math.ceil(self.rows / self.batch)

    @property
    def total(self) -> int:
        """Updates of the run."""
        if self.max_steps > 0:
            return self.max_steps
        whole = int(self.epochs)
        return whole * self.updates_per_epoch + math.ceil(self.epoch_rows(whole) / self.batch)

    @property
    def forward(self) -> int:
        """Most rows of one forward."""
        return min(self.micro, self.share)

    @property
    def share(self) -> int:
        """Most rows of one update that one rank has."""
        return math.ceil(self.batch / self.ranks)

    def micro_sizes(self, rows: int) -> list[int]:
        """Splits rows into forwards."""
        sizes = [self.micro] * (rows // self.micro)
        return [*sizes, rows % self.micro] if rows % self.micro else sizes

    def part(self, rows: int) -> tuple[int, int]:
        """Returns which rows of an update are this rank's: the first, and how many.

        Parts differ by one row at most, the first ranks have the larger ones; a rank may have none.
        """
        each, more = divmod(rows, self.ranks)
        return self.rank * each + min(self.rank, more), each + (self.rank < more)

    def forwards(self, rows: int) -> int:
        """Forwards of the rank that has most of an update."""
        return len(self.micro_sizes(math.ceil(rows / self.ranks)))

    def update_sizes(self, epoch: int, position: int) -> list[int]:
        """Rows of each update left in an epoch from a position on."""
        left = max(0, self.epoch_rows(epoch) - position)
        sizes = [self.batch] * (left // self.batch)
        return [*sizes, left % self.batch] if left % self.batch else sizes


def make_schedule(
    config: Config,
    data: PackedSet,
    device: str,
    choices: Choices,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> Schedule:
    """Resolves batch sizes; what the user left open is chosen and recorded.

    Args:
        config: The run's; its batch size is filled in.
        data: Training rows.
        device: `cpu` or `cuda`.
        choices: Where decisions are noted.
        rank: This process.
        ranks: Processes that share each update.
    """
    training = config.training
    if not _BATCH_KEYS & training.model_fields_set:
        _fit_batch(training, data.rows, choices)
    batch = training.train_batch_size
    share = math.ceil(batch / ranks)
    micro = training.per_device_train_batch_size
    if micro == "auto" and isinstance(training.gradient_accumulation_steps, int):
        micro = math.ceil(share / training.gradient_accumulation_steps)
    elif micro == "auto":
        fitting = max(1, TOKENS_PER_FORWARD[device] // data.max_length)
        micro = math.ceil(share / math.ceil(share / fitting))  # as equal as they can be
        choices.record(
            "training.per_device_train_batch_size",
            micro,
            f"about {TOKENS_PER_FORWARD[device]:,} tokens a forward on {device}, equal parts of "
            f"train_batch_size {batch}"
            + (f" on {ranks} ranks" if ranks > 1 else "")
            + "; any split gives the same update",
        )
    return Schedule(
        data.rows, batch, int(micro), training.num_train_epochs, training.max_steps, rank, ranks
    )


def _fit_batch(training: TrainingConfig, rows: int, choices: Choices) -> None:
    """Halves the default batch until an epoch has `UPDATES_PER_EPOCH` updates."""
    default = batch = training.train_batch_size
    while batch > 1 and rows / batch < UPDATES_PER_EPOCH:
        batch //= 2
    if batch != default:
        training.train_batch_size = choices.record(
            "training.train_batch_size",
            batch,
            f"{default} would give {math.ceil(rows / default)} updates an epoch from {rows} rows; "
            f"this gives {math.ceil(rows / batch)}",
        )


def evaluation_interval(training: TrainingConfig, total: int) -> int:
    """Updates between two evaluations."""
    if training.eval_steps == "auto":
        return max(1, total // EVALUATIONS)
    return training.eval_steps


def record_intervals(training: TrainingConfig, schedule: Schedule, choices: Choices) -> None:
    """Notes how often is evaluated and saved where the user left it open."""
    if training.eval_steps == "auto":
        every = evaluation_interval(training, schedule.total)
        reason = f"at least {EVALUATIONS} evaluations in {schedule.total} updates"
        choices.record("training.eval_steps", every, reason)
    if training.save_steps == "auto" and training.save_strategy == "steps":
        reason = "also after each evaluation with a new best"
        choices.record("training.save_steps", "ten minutes and each epoch", reason)


@dataclass(frozen=True)
class Update:
    """The rows of one update.

    Args:
        epoch: 0-based epoch.
        position: Position in the epoch after this update.
        micro_batches: This rank's, in order.
        rows: Rows of all ranks.
        forwards: Forwards of the rank that has most.
    """

    epoch: int
    position: int
    micro_batches: Sequence[MicroBatch]
    rows: int
    forwards: int


def updates(
    schedule: Schedule,
    data: PackedSet,
    seed: int,
    epoch: int,
    position: int,
    workers: int,
    pad_id: int,
) -> Iterator[Update]:
    """Yields updates from (epoch, position) on, across epoch borders, until rows run out."""
    while schedule.epoch_rows(epoch) > 0:
        sizes = schedule.update_sizes(epoch, position)
        places = _places(schedule, epoch, position)
        stream = batches_at(data, seed, epoch, places, workers, pad_id)
        for size in sizes:
            group = [next(stream) for _ in schedule.micro_sizes(schedule.part(size)[1])]
            position += size
            yield Update(epoch, position, group, size, schedule.forwards(size))
        epoch, position = epoch + 1, 0


def _places(schedule: Schedule, epoch: int, position: int) -> Iterator[tuple[int, int]]:
    """Position and rows of each of this rank's forwards, to the end of an epoch."""
    for size in schedule.update_sizes(epoch, position):
        first, count = schedule.part(size)
        place = position + first
        for rows in schedule.micro_sizes(count):
            yield place, rows
            place += rows
        position += size
