"""Progress of the ranks beside the first: nothing, or lines that name the rank."""

from __future__ import annotations

from glasstune.reports.terminal import RichProgress


class SilentProgress:
    """Draws nothing; implements `core.protocols.Progress`."""

    def start(self, task: str, total: int | None, unit: str) -> None:
        """Nothing."""

    def advance(self, task: str, amount: int = 1, **fields: float | str) -> None:
        """Nothing."""

    def finish(self, task: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class RankProgress(RichProgress):
    """Plain lines on stderr, each with the rank's number.

    Args:
        rank: Its number.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(live=False)
        self.rank = rank

    def say(self, text: str) -> None:
        """Prints one line."""
        super().say(f"[rank {self.rank}] {text}")


def progress_of(rank: int, logs: bool) -> RichProgress | SilentProgress:
    """Returns what a rank shows.

    Args:
        rank: Its number.
        logs: Whether it writes a log.
    """
    if rank == 0:
        return RichProgress()
    return RankProgress(rank) if logs else SilentProgress()
