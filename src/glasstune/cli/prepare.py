"""Commands before a run: `doctor`, `init`, `data`, `config`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from glasstune.cli.app import app
from glasstune.cli.common import JsonOption, console, emit, progress, show
from glasstune.cli.train import split_arguments
from glasstune.core.errors import InputError
from glasstune.core.files import write_text_atomic

_PAGE_ROWS = 20
"""Rows on a page where `--show` names no number."""


@app.command()
def doctor(json: JsonOption = None) -> None:
    """Show device, versions, memory and disk, and try which precisions work here."""
    from glasstune.workflows.doctor import doctor as workflow

    show("doctor", workflow(progress=progress()).to_dict(), json)


@app.command()
def init(
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Hub id, folder or GGUF file.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="F", help="File, glob or hub id.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="config.yaml", help="Where it goes; else stdout."),
    ] = None,
    from_file: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Translate a LLaMA-Factory or Axolotl YAML, or a fine-tune.py command line: a "
            "file, the command itself in quotes, or - for standard input.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let Python code of the checkpoint run.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Write a short commented config for a model and a data file."""
    from glasstune.workflows.init import init as workflow

    result = workflow(
        model, data, output=output, from_file=from_file, trust_remote_code=trust_remote_code
    )
    for note in result.notes:
        sys.stderr.write(f"note: {note}\n")
    if output is not None:
        sys.stderr.write(f"wrote {output}; next: glasstune train {output}\n")
    elif json != "-":
        sys.stdout.write(result.text)
    emit(result.to_dict(), json)


@app.command()
def data(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG [KEY=VALUE]...", help="A YAML file, and overrides."),
    ],
    rows: Annotated[
        int, typer.Option("--show", min=0, metavar="N", help="Print N rows as they are trained.")
    ] = 0,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page too; it shows N rows, or the first 20."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Check the data of a config: rows, lengths, what is trained, what is wrong.

    Exit code 2 where `train` would refuse the data; the record is written all the same.
    """
    if html is not None:
        from glasstune.workflows.inspect import check_html

        html = check_html(html)
    from glasstune.core.config_load import load_config
    from glasstune.reports.mask_text import print_rows
    from glasstune.reports.terminal import say_notes

    path, overrides = split_arguments(arguments)
    loaded = load_config(path, overrides)
    bars = progress()
    say_notes(loaded.notes, bars)
    from glasstune.workflows.data import check_data

    try:
        drawn = rows or (_PAGE_ROWS if html is not None else 0)
        checked = check_data(loaded.config, show=drawn, progress=bars)
    finally:
        bars.close()
    print_rows(checked.shown[:rows], console(json))
    record = checked.record.to_dict()
    show("data", record, json)
    if html is not None:
        from glasstune.reports.mask_page import mask_page

        write_text_atomic(html, mask_page(record, [row.to_dict() for row in checked.shown]))
        bars.say(f"wrote {html}")
    if checked.failed:
        raise typer.Exit(2)


@app.command()
def config(
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Print every key with default and meaning (YAML).")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema.")] = False,
    json: JsonOption = None,
) -> None:
    """Print the configuration's defaults or its schema."""
    if defaults == schema:
        raise InputError(
            "defaults_or_schema",
            "give one of --defaults and --schema",
            where="command line",
            fix="glasstune config --defaults > config.yaml",
        )
    from glasstune.workflows.config import config_text

    text, record = config_text("defaults" if defaults else "schema")
    if json != "-":
        sys.stdout.write(text)
    emit(record, json)
