"""`glasstune plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glasstune.cli.app import app
from glasstune.cli.common import JsonOption, console, emit, progress
from glasstune.cli.train import split_arguments
from glasstune.core.errors import InputError
from glasstune.core.files import write_text_atomic


@app.command()
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="A YAML file, and overrides such as training.recompute=full (values in YAML).",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Hub id, folder or GGUF file (model.path).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="F", help="File, glob or hub id (data.sources).")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Load the model, run one step of the longest batch, compare."
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page too.")] = None,
    json: JsonOption = None,
) -> None:
    """Foretell memory, time and disk of a run, from its configuration and data alone.

    Ends with 2 where the run would not fit: the message names the bytes and three ways out.
    """
    if html is not None and (not html.expanduser().parent.is_dir() or html.is_dir()):
        raise InputError(
            "html_not_writable", f"{html} cannot be written", where="--html", fix="name a file"
        )
    from glasstune.core.config_load import load_config

    path, overrides = split_arguments(arguments or [])
    loaded = load_config(path, overrides, model=model, data=data)
    bars = progress()
    from glasstune.reports.terminal import say_notes

    say_notes(loaded.notes, bars)
    from glasstune.workflows.plan import plan as workflow

    try:
        record = workflow(loaded.config, measure=measure, progress=bars).to_dict()
    finally:
        bars.close()
    from glasstune.reports.plan_text import print_plan

    print_plan(record, console(json))
    if html is not None:
        from glasstune.reports.plan_page import plan_page

        write_text_atomic(html.expanduser(), plan_page(record))
        bars.say(f"wrote {html}")
    emit(record, json)
