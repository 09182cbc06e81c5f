"""What every command shares: the `--json` option, output streams, and "not built yet"."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from glasstune.core.errors import InputError
from glasstune.core.files import dump_json, write_text_atomic

if TYPE_CHECKING:
    from rich.console import Console

    from glasstune.reports.terminal import RichProgress


def _check_json(value: str | None) -> str | None:
    """Refuses a place that cannot be written, before anything runs."""
    if value is not None and value != "-":
        path = Path(value)
        if not path.parent.is_dir() or path.is_dir():
            problem = "is a folder" if path.is_dir() else f"needs the folder {path.parent}"
            raise InputError(
                "json_not_writable", f"{value} {problem}", where="--json", fix="name a file, or -"
            )
    return value


JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the result record as JSON, also on failure; - is stdout.",
        callback=_check_json,
    ),
]

CheckpointOption = Annotated[
    str | None,
    typer.Option(metavar="best|last|step-N", help="Which checkpoint of a run; its adapter/ else."),
]
NoAdapterOption = Annotated[
    bool, typer.Option("--no-adapter", help="Use the base model alone, with the run's template.")
]
BitsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Precision of the base: 16, 8 or 4; the run's by default."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="float32, bfloat16 or float16; the run's by default."),
]
TemperatureOption = Annotated[
    float, typer.Option(metavar="T", help="0 takes the most likely token each time.")
]
TopPOption = Annotated[float, typer.Option(metavar="P", help="Share of probability to draw from.")]
SeedOption = Annotated[int, typer.Option(metavar="N", help="Seed of the draws.")]
DeviceOption = Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu or cuda.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python code of the checkpoint run.")
]

NOT_BUILT: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that is not built: any option may be given."""


def not_built(what: str, fix: str = "") -> NoReturn:
    """Says that a part is not built yet.

    Raises:
        InputError: Always; exit code 2.
    """
    raise InputError("not_built", f"{what} is not built yet in this version", fix=fix)


def progress() -> RichProgress:
    """Returns the progress that draws on stderr."""
    from glasstune.reports.terminal import RichProgress

    return RichProgress()


def console(json: str | None = None) -> Console:
    """Returns where tables go: stdout, or stderr where stdout carries the JSON record."""
    from glasstune.reports.terminal import console_for

    return console_for(sys.stderr if json == "-" else sys.stdout)


def emit(record: Mapping[str, Any], json: str | None) -> None:
    """Writes a command's record where `--json` asks."""
    if json is None:
        return
    text = dump_json(record, indent=2) + "\n"
    if json == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_text_atomic(Path(json), text)


def show(kind: str, record: Mapping[str, Any], json: str | None) -> None:
    """Prints a record as tables, then writes it where `--json` asks."""
    from glasstune.reports.tables import print_record

    print_record(kind, record, console(json))
    emit(record, json)


def set_options(**options: Any) -> dict[str, Any]:
    """Keeps the options that were given."""
    return {name: value for name, value in options.items() if value not in (None, False)}
