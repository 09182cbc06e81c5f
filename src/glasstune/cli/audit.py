"""`glasstune audit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from glasstune.cli.app import app
from glasstune.cli.common import JsonOption, emit, progress
from glasstune.cli.train import split_arguments
from glasstune.core.errors import InputError


@app.command()
def audit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]...",
            help="A YAML file, or a run folder (its configuration, and its adapter as it is), and "
            "overrides such as training.train_batch_size=4.",
        ),
    ],
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Updates to make; the record is the last one's.")
    ] = 1,
    print_all: Annotated[
        bool,
        typer.Option(
            "--print",
            help="Print every parameter: value, requires_grad, gradient before and after backward.",
        ),
    ] = False,
    values: Annotated[
        bool, typer.Option("--values", help="Print the tensors too, long ones abridged.")
    ] = False,
    match: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only parameters of such names.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page too.")] = None,
    json: JsonOption = None,
) -> None:
    """Show every parameter's gradient by loss term, and why one has none; changes no run.

    Makes the first updates in memory, on the plain path. Ends with 1 where training would stop:
    the first-step gate refuses, or a loss or gradient is not finite; the record is written too.
    """
    page = None if html is None else _page(html)
    path, overrides = split_arguments(arguments)
    if path is None:
        raise InputError(
            "no_config", "no configuration given", where="command line", fix="name a file first"
        )
    from glasstune.workflows import audit as workflow

    bars = progress()
    loaded = workflow.find_config(str(path), overrides)
    from glasstune.reports.terminal import say_notes

    say_notes(loaded.notes, bars)
    try:
        result = workflow.audit(
            loaded.config, steps=steps, values=values, match=match, progress=bars
        )
    finally:
        bars.close()
    text = result.text(full=print_all or match is not None, values=values)
    typer.echo(text, err=json == "-")
    record = result.to_dict()
    emit(record, json)
    if html is not None and page is not None:
        history = workflow.read_history(str(path))
        html.write_text(page(record, history), encoding="utf-8")
        bars.say(f"wrote {html}")
    if not result.ok:
        raise typer.Exit(1)


def _page(place: Path) -> Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], str]:
    """Returns what draws the page, before hours are spent on what it would show.

    Raises:
        InputError: It cannot be written there.
    """
    if not place.parent.is_dir() or place.is_dir():
        problem = "is a folder" if place.is_dir() else f"needs the folder {place.parent}"
        raise InputError(
            "html_not_writable", f"{place} {problem}", where="--html", fix="name a file"
        )
    from glasstune.reports.audit_page import audit_page

    return audit_page
