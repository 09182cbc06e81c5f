"""A bar of megabytes with its rate: the time left follows from it."""

from __future__ import annotations

import time

from glasstune.core.protocols import Progress


class ReadBar:
    """Progress in megabytes.

    Args:
        progress: Where it is drawn; None draws nothing.
        task: Its name.
        total: Bytes in all.
    """

    def __init__(self, progress: Progress | None, task: str, total: int) -> None:
        self._progress, self._task = progress, task
        self._done, self._told = 0.0, 0
        self._began = time.monotonic()
        if progress is not None:
            progress.start(task, max(1, round(total / 1e6)), "MB")

    def advance(self, size: int) -> None:
        """Says that so many bytes more are done."""
        self._done += size / 1e6
        if self._progress is not None:
            amount = int(self._done) - self._told
            self._told += amount
            rate = self._done / max(time.monotonic() - self._began, 1e-9)
            self._progress.advance(self._task, amount, rate=f"{rate:.0f} MB/s")

    def finish(self) -> None:
        """Closes the bar."""
        if self._progress is not None:
            self._progress.finish(self._task)
