"""The typer application; command files register themselves on it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

ORDER = (
    "demo",
    "doctor",
    "init",
    "inspect",
    "data",
    "plan",
    "train",
    "audit",
    "merge",
    "generate",
    "chat",
    "evaluate",
    "report",
    "config",
)
"""Commands in the order of a run."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the commands in the order of a run, not of their files."""
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    name="glasstune",
    help="Fine-tune a causal language model with LoRA on a 16-, 8- or 4-bit base.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(value: bool) -> None:
    if value:
        from glasstune import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fine-tune a causal language model with LoRA on a 16-, 8- or 4-bit base."""
