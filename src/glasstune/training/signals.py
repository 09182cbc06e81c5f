"""SIGINT and SIGTERM: finish nothing new, save, leave with exit code 3."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

from glasstune.core.findings import Finding


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


class SignalHook:
    """Looks for a signal before every backward, so that a long update does not delay it."""

    def __init__(self, watch: SignalWatch) -> None:
        self.watch = watch

    def before_update(self, step: int) -> None:
        """Nothing."""

    def before_backward(self, step: int, terms: Mapping[str, Any], batch: Any) -> None:
        """Raises `Interrupted` where a signal has come."""
        self.watch.check()

    def after_backward(self, step: int, model: Any, optimizer: Any) -> None:
        """Nothing."""

    def after_update(self, step: int, model: Any, learning_rate: float) -> Sequence[Finding]:
        """Nothing."""
        return ()
