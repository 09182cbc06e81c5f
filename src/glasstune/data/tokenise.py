"""All sources to tokenised rows: from the cache, or made now by one or several processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from glasstune.core.choices import Choices
from glasstune.core.protocols import Progress
from glasstune.core.units import format_bytes
from glasstune.data.cache import Entry, Kept, Lease
from glasstune.data.choose import OpenSource
from glasstune.data.chunks import chunks
from glasstune.data.documents import Piece, Store
from glasstune.data.keys import FileState, source_key
from glasstune.data.processes import CannotSendError, Job, Pool, do
from glasstune.data.shards import Shard, to_batch
from glasstune.data.tally import Tally
from glasstune.data.trim import LIMIT, limit, trim
from glasstune.data.work import Task, Worker

_BAR = "data"
SMALL = 8_000_000
"""Bytes below which starting processes costs more than it saves (2 s each, for transformers)."""


@dataclass
class Tokeniser:
    """Turns sources into stored rows.

    Args:
        task: What to do with rows.
        opened: The sources.
        choices: Where the number of processes and the use of the cache are noted.
        progress: Shows how far it is.
        processes: How many; None decides by size and processors.
    """

    task: Task
    opened: Sequence[OpenSource]
    choices: Choices
    progress: Progress | None = None
    processes: int | None = None
    _pool: Pool | None = field(default=None, init=False)
    _worker: Worker | None = field(default=None, init=False)
    _leases: list[Lease] = field(default_factory=list, init=False)
    _grown: bool = field(default=False, init=False)

    def run(self) -> tuple[Store, list[Tally]]:
        """Returns all rows and, per source, what happened to them.

        Raises:
            InputError: A file cannot be read, or the cache not be written.
            RunError: The disk is full, or a process ended.
        """
        limit()  # a wrong one is said before the work
        pieces: list[Piece] = []
        tallies: list[Tally] = []
        try:
            for index, source in enumerate(self.opened):
                in_memory = source.config.rows is not None
                found, tally = (self._in_memory if in_memory else self._on_disk)(index, source)
                pieces += found
                tallies.append(tally)
        finally:
            if self._pool is not None:
                self._pool.close()
        if self._grown:
            self._trim()
        return Store(pieces, self._leases), tallies

    def _in_memory(self, index: int, source: OpenSource) -> tuple[list[Piece], Tally]:
        """Rows from Python stay in memory, and so do their columns, whatever they hold."""
        self.choices.record(
            f"data.cache.{source.name}",
            "none",
            "rows given from Python stay in memory, tokenised anew by this process; those of a "
            "file are tokenised once, by several processes, and lie on disk",
        )
        whole, pieces = Tally(), []
        bar = _Bar(self.progress, len(source.config.rows or ()), "rows")
        worker = Worker(replace(self.task, plain_columns=False))
        for chunk in chunks(source):
            rows, tally = worker.work(index, chunk)
            columns = [row.columns for row in rows] if self.task.keep_columns else None
            shard = Shard(to_batch(rows, keep_columns=False), columns)
            pieces.append(Piece(index, shard.rows, partial(_same, shard)))
            whole.merge(tally)
            bar.move(chunk.size, tally.rows)
        bar.close()
        return pieces, whole

    def _on_disk(self, index: int, source: OpenSource) -> tuple[list[Piece], Tally]:
        files = [FileState.of(path) for path in source.files or ()]
        entry = Entry.of(source_key(self.task, index, source, files))
        self._leases.append(entry.lease())
        with entry.locked():
            kept = entry.finished()
            if kept is None:
                kept = self._make(index, source, files, entry)
                how = "made", "rows, tokenizer, template or options are new"
                self._grown = True
            else:
                how = "read", "the same rows were tokenised in the same way before"
        self.choices.record(f"data.cache.{source.name}", how[0], f"{how[1]}: {entry.folder}")
        bases = [str(file.path) for file in files] or [""]
        whole = Tally()
        for piece in kept:
            whole.merge(piece.tally.moved("", bases[piece.file]))
        return entry.pieces(index, kept, bases), whole

    def _trim(self) -> None:
        """Removes what the cache holds beyond its limit, and says it."""
        found = trim()
        if found.entries:
            self.choices.record(
                "data.cache.removed",
                found.entries,
                f"entries that were not used for longest, {format_bytes(found.size)}: the cache "
                f"may hold {format_bytes(found.limit)} ({LIMIT}); none in use is removed",
            )

    def _make(
        self, index: int, source: OpenSource, files: Sequence[FileState], entry: Entry
    ) -> list[Kept]:
        """Tokenises the pieces that the entry lacks."""
        size = sum(file.size for file in files) if files else len(source.table)
        bar = _Bar(self.progress, size, "bytes" if files else "rows")
        there = 0

        def missing() -> Iterator[Job]:
            nonlocal there
            for chunk in chunks(source):
                there += 1
                piece = entry.kept(chunk.number)
                if piece is None:
                    yield Job(index, chunk, entry)
                else:
                    bar.move(chunk.size, piece.tally.rows, made=False)

        many = size >= SMALL if files else len(source.table) >= SMALL // 1000
        for job, rows in self._done(missing(), many):
            bar.move(job.chunk.size, rows)
        bar.close()
        try:
            for file in files:
                file.check()
        except Exception:
            entry.remove()
            raise
        kept = [entry.kept(number) for number in range(there)]
        whole = [piece for piece in kept if piece is not None]
        if len(whole) != there:
            raise RuntimeError(f"{there - len(whole)} pieces of {entry.folder} cannot be read back")
        entry.finish(there)
        return whole

    def _done(self, jobs: Iterable[Job], many: bool) -> Iterator[tuple[Job, int]]:
        """Does jobs, and yields them in order."""
        pool = self._processes(many)
        if pool is not None:
            yield from pool.run(jobs)
            return
        for job in jobs:
            yield job, do(self._own_worker(), job)

    def _own_worker(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self.task)
        return self._worker

    def _processes(self, many: bool) -> Pool | None:
        if self._pool is not None:
            return self._pool
        number, reason = self.processes, "as asked"
        if number is None:
            number = len(os.sched_getaffinity(0)) if many else 1
            reason = "processors that this process may use" if many else "the files are small"
        if number > 1:
            try:
                self._pool = Pool(self.task, number)
            except CannotSendError as error:
                number = 1
                reason = f"the tokenizer cannot be handed to another process: {error}"
        self.choices.record("data.processes", number, f"{reason}; it changes no row")
        return self._pool


def _same(shard: Shard) -> Shard:
    return shard


class _Bar:
    """A bar over bytes or rows that shows rows and rows a second."""

    def __init__(self, progress: Progress | None, total: int, unit: str) -> None:
        self.progress = progress
        self.scale = 1
        if unit == "bytes":
            self.scale, unit = (1_000_000, "MB") if total >= 10_000_000 else (1000, "kB")
        self.total = -(-total // self.scale)
        self.done = self.shown = self.rows = self.made = 0
        self.started = time.monotonic()
        if progress is not None:
            progress.start(_BAR, self.total, unit)

    def move(self, size: int, rows: int, *, made: bool = True) -> None:
        """Moves on by a piece."""
        self.done += size
        self.rows += rows
        self.made += rows if made else 0
        step = min(self.total, self.done // self.scale) - self.shown
        self.shown += step
        if self.progress is not None:
            rate = self.made / max(time.monotonic() - self.started, 1e-9)
            fields = {"rows": f"{self.rows:,}", "rows/s": f"{rate:,.0f}"}
            self.progress.advance(_BAR, step, **fields)

    def close(self) -> None:
        """Ends it, at its end: parts of a unit were not shown."""
        if self.progress is not None:
            if self.done:
                self.progress.advance(_BAR, self.total - self.shown)
            self.progress.finish(_BAR)
