"""The command `glasstune`: runs the application and turns every error into an exit code.

0 done · 1 the run failed, a gate refused, or a bug (with traceback) · 2 the input is wrong ·
3 stopped by a signal with a checkpoint to go on from.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from glasstune.cli import (  # noqa: F401 - they register commands
    audit,
    chat,
    inspect,
    merge,
    plan,
    prepare,
    train,
    unbuilt,
    use,
)
from glasstune.cli.app import app
from glasstune.cli.common import emit
from glasstune.core.errors import GlasstuneError
from glasstune.core.memory import is_out_of_memory
from glasstune.core.ranks import leave_exit_code

INTERRUPTED = 130


def entry() -> None:
    """Runs the command line of this process and exits."""
    # Before torch loads: OpenMP threads that wait give their core away soon, or one busy
    # neighbour makes a step several times slower (docs/LOG.md has the numbers).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    code = run(sys.argv[1:])
    leave_exit_code(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line.

    Args:
        arguments: Words after `glasstune`; none shows the help.

    Returns:
        The exit code.
    """
    words = list(arguments) or ["--help"]
    target = json_target(words)
    if twice := repeated(words):
        error = _error("usage", f"{twice} is given twice", "command line", "keep one of them")
        return _fail(error, 2, target)
    try:
        code: Any = app(args=words, prog_name="glasstune", standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            return _fail(_error("interrupted", "interrupted"), INTERRUPTED, target)
        return code if isinstance(code, int) else 0
    except GlasstuneError as error:
        return _fail(error.to_dict(), error.exit_code, target, said=error.said)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_error("interrupted", "interrupted"), INTERRUPTED, target)
    except BrokenPipeError:
        # The reader went away (`glasstune ... | head`): nothing is left to say.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until the process ends
        return 1
    except Exception as error:
        usage = _usage(error)
        if usage is not None:
            return _fail(usage, 2, target)
        if is_out_of_memory(error):
            return _fail(_short_of_memory(error), 1, target)
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        sys.stderr.write("this is a bug of Glasstune: please report it with the lines above\n")
        _emit_failure(_error("bug", message), target)
        return 1


def json_target(words: Sequence[str]) -> str | None:
    """Returns where `--json` points, read before parsing so that it also serves bad usage."""
    target = None
    for index, word in enumerate(words):
        if word == "--":
            break
        if word == "--json" and index + 1 < len(words):
            target = words[index + 1]
        elif word.startswith("--json="):
            target = word.removeprefix("--json=")
    return target


def repeated(words: Sequence[str]) -> str | None:
    """Returns an option that stands twice among the words; the parser would take the last."""
    seen: set[str] = set()
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0]
        if word.startswith("--") and name in seen:
            return name
        seen.add(name)
    return None


def _error(code: str, message: str, where: str = "", fix: str = "") -> dict[str, str]:
    return {"code": code, "message": message, "where": where, "fix": fix}


def _short_of_memory(error: Exception) -> dict[str, str]:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    fix = "free the device of other processes, or take fewer rows at a time, shorter ones, or bits"
    return _error("out_of_memory", f"memory is short: {first}", fix=fix)


def _usage(error: Exception) -> dict[str, str] | None:
    """Reads click's usage errors by shape: typer carries a copy of click with its own classes."""
    if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
        return None
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", None) or "glasstune"
    message = " ".join(str(error.format_message()).split())
    return _error("usage", message, fix=f"see {command} --help")


def _fail(error: dict[str, str], code: int, target: str | None, *, said: bool = False) -> int:
    place = f"{error['where']}: " if error["where"] else ""
    if not said:  # by another process of the same run
        sys.stderr.write(f"error: {_who()}{place}{error['message']}\n")
        if error["fix"]:
            sys.stderr.write(f"hint: {error['fix']}\n")
    if error["code"] != "json_not_writable":
        _emit_failure(error, target)
    return code


def _who() -> str:
    """Names the process, where it is not the only or the first one of a run."""
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    return "" if rank == "0" else f"rank {rank}: "


def _emit_failure(error: dict[str, str], target: str | None) -> None:
    if _who():
        return  # rank 0 writes
    try:
        emit({"ok": False, "error": error}, target)
    except Exception as problem:
        sys.stderr.write(f"error: the record could not be written to {target}: {problem}\n")
