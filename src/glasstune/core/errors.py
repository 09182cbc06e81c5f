"""Errors that name the culprit: the user, the run, or a signal.

Anything that is not a `GlasstuneError` is our own fault and keeps its traceback.
"""

from __future__ import annotations


class GlasstuneError(Exception):
    """An error with one clear message, a place and a remedy.

    Args:
        code: A stable name in snake case for scripts and tests, for example `unknown_key`.
        message: What was found, in one or two sentences.
        where: File and line, config key, row or tensor; empty where there is none.
        fix: What to do next.

    Attributes:
        said: Whether another process of the run says it, so that this one need not.
    """

    exit_code = 1
    said = False

    def __init__(self, code: str, message: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\nhint: {self.fix}" if self.fix else text

    def to_dict(self) -> dict[str, str]:
        """Returns the `error` object of a failed `--json` record."""
        return {"code": self.code, "message": self.message, "where": self.where, "fix": self.fix}


class InputError(GlasstuneError):
    """The user's input is wrong: exit code 2."""

    exit_code = 2


class RunError(GlasstuneError):
    """The run failed or a gate refused: exit code 1."""

    exit_code = 1


class StoppedBySignal(GlasstuneError):
    """SIGINT or SIGTERM arrived; a checkpoint was saved and the run can go on: exit code 3."""

    exit_code = 3
