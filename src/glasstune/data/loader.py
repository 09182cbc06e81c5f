"""Batches of an epoch, prepared ahead by threads: same content and order for any number of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from glasstune.core.batch import MicroBatch
from glasstune.data.packing import PackedSet

_AHEAD = 2
"""Batches that each thread may be ahead of the one that is trained."""


def batches(
    data: PackedSet,
    seed: int,
    epoch: int,
    start: int,
    micro_sizes: Iterable[int],
    num_workers: int,
    pad_id: int,
) -> Iterator[MicroBatch]:
    """Yields the micro-batches of an epoch from a global position on.

    Args:
        data: The packed set.
        seed: Seed of the order.
        epoch: 0-based epoch.
        start: Position in the epoch of the first row.
        micro_sizes: Rows of each coming micro-batch.
        num_workers: Threads; 0 prepares each batch when it is asked for.
        pad_id: Any token id.

    Raises:
        ValueError: The sizes reach past the epoch's end.
    """
    places = _in_a_row(start, micro_sizes)
    yield from batches_at(data, seed, epoch, places, num_workers, pad_id)


def batches_at(
    data: PackedSet,
    seed: int,
    epoch: int,
    places: Iterable[tuple[int, int]],
    num_workers: int,
    pad_id: int,
) -> Iterator[MicroBatch]:
    """Yields micro-batches of an epoch, such as one rank's.

    Args:
        data: The packed set.
        seed: Seed of the order.
        epoch: 0-based epoch.
        places: Global position of the first row, and rows, of each.
        num_workers: Threads; 0 prepares each batch when it is asked for.
        pad_id: Any token id.

    Raises:
        ValueError: A place reaches past the epoch's end.
    """
    jobs = _jobs(data, seed, epoch, places)
    if num_workers == 0:
        for packs, position in jobs:
            yield data.micro_batch(packs, position, pad_id)
        return
    waiting: deque[Future[MicroBatch]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="batches")
    try:
        for packs, position in jobs:
            waiting.append(pool.submit(data.micro_batch, packs, position, pad_id))
            if len(waiting) > num_workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _in_a_row(start: int, sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    for size in sizes:
        yield start, size
        start += size


def _jobs(
    data: PackedSet, seed: int, epoch: int, places: Iterable[tuple[int, int]]
) -> Iterator[tuple[list[int], int]]:
    order = data.order(seed, epoch)
    for position, size in places:
        if not 0 < size <= data.rows - position:
            raise ValueError(f"{size} rows at {position} reach past an epoch of {data.rows} rows")
        yield order[position : position + size].tolist(), position


def evaluation_batches(
    data: PackedSet, rows_per_batch: int, pad_id: int, *, first: int = 0, every: int = 1
) -> Iterator[MicroBatch]:
    """Yields all rows once in their own order, one batch in memory at a time.

    Args:
        data: The packed set.
        rows_per_batch: Rows of a batch; the last may have fewer.
        pad_id: Any token id.
        first: Number of the first batch to yield.
        every: Yields each Nth from there on: the batches of one of several ranks.
    """
    step = every * rows_per_batch
    for start in range(first * rows_per_batch, data.rows, step):
        rows = range(start, min(start + rows_per_batch, data.rows))
        yield data.micro_batch(list(rows), start, pad_id)
