"""The command `chat`: reads what the user types, or what a pipe holds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import IO, Annotated

import typer

from glasstune.cli.app import app
from glasstune.cli.common import (
    BitsOption,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    NoAdapterOption,
    SeedOption,
    TemperatureOption,
    TopPOption,
    TrustOption,
    emit,
    progress,
    set_options,
)
from glasstune.cli.use import ModelArgument
from glasstune.core.errors import InputError

PROMPT, MORE = "> ", ". "
BLOCK = '"""'


@app.command()
def chat(
    run_or_model: ModelArgument,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answers with and without the adapter, side by side.")
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest answer in tokens.")
    ] = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    checkpoint: CheckpointOption = None,
    no_adapter: NoAdapterOption = False,
    bits: BitsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = None,
) -> None:
    """Chat with a model in the terminal; /help lists the commands."""
    from glasstune.reports.chat_view import ChatView
    from glasstune.workflows import chat as workflow

    typed = sys.stdin.isatty()
    out = sys.stderr if json == "-" else sys.stdout
    view = ChatView(out, out if typed else sys.stderr)
    if typed:
        view.say("loading; /help lists the commands")
    options = set_options(
        system=system, checkpoint=checkpoint, no_adapter=no_adapter, bits=bits, dtype=dtype,
        device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    read = reader(typed, sys.stderr if json == "-" else None)
    with silent_keys() if typed else contextlib.nullcontext():
        record = workflow.chat(
            run_or_model, read, view, compare=compare, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p, seed=seed, interactive=typed,
            progress=progress(), **options,
        )  # fmt: skip
    emit(record, json)


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Keeps the terminal from writing `^C` into an answer; as it was again afterwards."""
    try:
        import termios
    except ImportError:  # no such terminals on this system
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    changed = list(before)
    changed[3] = before[3] & ~termios.ECHOCTL
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def reader(typed: bool, clean: IO[str] | None = None) -> Callable[[], str | None]:
    """Returns what reads the next entry: from a person with a prompt, else line by line.

    Args:
        typed: Whether a person types.
        clean: Where the prompt goes instead of stdout, when that carries the record.
    """
    ask: Callable[[str], str] = _piped
    if typed:
        ask = input if clean is None else lambda prompt: (clean.write(prompt), _piped(prompt))[1]
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its line editing and history
    return lambda: read_entry(ask)


def _piped(prompt: str) -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError:
        raise InputError(
            "bad_unicode", "it is not UTF-8", where="standard input", fix="give the text as UTF-8"
        ) from None
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def read_entry(ask: Callable[[str], str]) -> str | None:
    r"""Reads one entry, of one line or more.

    A line that ends with \ goes on in the next; a block stands between two `\"\"\"`.

    Args:
        ask: Shows a prompt and gives a line; raises EOFError at the end.

    Returns:
        The text; None at the end of the input. An end inside an entry ends the entry.
    """
    try:
        line = ask(PROMPT)
    except EOFError:
        return None
    lines: list[str] = []
    block = line.lstrip().startswith(BLOCK)
    if block:
        line = line.lstrip().removeprefix(BLOCK)
    while True:
        if block and line.rstrip().endswith(BLOCK):
            lines.append(line.rstrip().removesuffix(BLOCK))
            break
        if not block and not line.endswith("\\"):
            lines.append(line)
            break
        lines.append(line if block else line[:-1])
        try:
            line = ask(MORE)
        except EOFError:
            break
    return "\n".join(lines).strip("\n") if block else "\n".join(lines)
