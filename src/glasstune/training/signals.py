"""SIGINT and SIGTERM: finish nothing new, save, leave with exit code 3."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """Raised between two micro-batches after a signal; the loop saves and stops."""


class SignalWatch:
    """Notes the first signal; a second one acts as if there were no watch.

    Only the main thread may set handlers; elsewhere the watch never fires.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def check(self) -> None:
        """Raises `Interrupted` where a signal has come."""
        if self.received is not None:
            raise Interrupted

    @property
    def name(self) -> str:
        """Name of the signal received."""
        return signal.Signals(self.received).name if self.received else ""


Check = Callable[[], None]
