"""Commands of the contract that are not built yet: each says so, with exit code 2."""

from __future__ import annotations

from typing import Annotated

import typer

from glasstune.cli.app import app
from glasstune.cli.common import NOT_BUILT, JsonOption, not_built

Rest = Annotated[list[str] | None, typer.Argument(metavar="...", help="Anything.")]


@app.command(context_settings=NOT_BUILT)
def report(rest: Rest = None, json: JsonOption = None) -> None:
    """Write a run's report.html again (not built yet)."""
    not_built("glasstune report", "metrics.jsonl and run.json hold the numbers")
