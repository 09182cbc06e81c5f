"""`glasstune train`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from glasstune.cli.app import app
from glasstune.cli.common import JsonOption, console, emit
from glasstune.core.errors import InputError
from glasstune.core.ranks import this_rank

NEWEST = "newest"
_CHECKPOINT = re.compile(r"step-?\d+|newest|last|best|latest")


class ResumeCommand(TyperCommand):
    """Lets `--resume` stand alone: its value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Gives a bare `--resume` the value `newest` before click reads it."""
        words: list[str] = []
        for index, word in enumerate(args):
            bare = word == "--resume" and not (
                index + 1 < len(args) and _CHECKPOINT.fullmatch(args[index + 1])
            )
            words.append(f"--resume={NEWEST}" if bare else word)
        return super().parse_args(ctx, words)


@app.command(cls=ResumeCommand)
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="A YAML file, and overrides such as training.learning_rate=1e-4 or "
            "data.sources.0.path=rows.jsonl (values in YAML).",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Hub id, folder or GGUF file (model.path).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="F", help="File, glob or hub id (data.sources).")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[step-N]", help="Go on from the newest complete checkpoint, or from step-N."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that the output folder holds.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check data and print the resolved config; train nothing."),
    ] = False,
    nproc: Annotated[
        str | None,
        typer.Option(
            metavar="N|all", help="Train with N processes, one a GPU, started by torchrun."
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Train a LoRA adapter: from a config file, or with --model and --data alone."""
    if nproc is not None:
        from glasstune.workflows.ranks import device_count, launch

        if (count := device_count(nproc)) > 1:
            options = {"--model": model, "--data": data, "--resume": resume, "--json": json}
            words = [f"{name}={value}" for name, value in options.items() if value is not None]
            flags = {"--overwrite": overwrite, "--dry-run": dry_run}
            words += [name for name, on in flags.items() if on]
            raise typer.Exit(launch(count, [*(arguments or []), *words]))
    from glasstune.core.config_load import load_config

    path, overrides = split_arguments(arguments or [])
    rank = this_rank()
    try:
        loaded = load_config(path, overrides, model=model, data=data)
    except InputError as error:
        if rank.count > 1:
            from glasstune.workflows.ranks import fail_together

            fail_together(error)
        raise
    from glasstune.reports.ranks import progress_of

    bars = progress_of(rank.index, rank.logs)
    for note in loaded.notes:
        bars.say(f"note: {note}")
    from glasstune.workflows.train import train as train_workflow

    try:
        record = train_workflow(
            loaded.config,
            resume=resume_value(resume),
            overwrite=overwrite,
            dry_run=dry_run,
            progress=bars,
            notes=loaded.notes,
        )
    finally:
        bars.close()
    if rank.index:  # rank 0 says and writes it
        raise typer.Exit(0 if record.ok else 1)
    from glasstune.reports.tables import print_record

    result = record.to_dict()
    print_record("dry_run" if dry_run else "train", result, console(json))
    if result.get("plan"):
        from glasstune.reports.plan_text import print_plan

        print_plan(result["plan"], console(json))
    emit(result, json)
    if not result["ok"]:
        raise typer.Exit(3 if result.get("stopped_by") == "signal" else 1)


def resume_value(text: str | None) -> str | bool | None:
    """Reads the value of `--resume`: True for the newest checkpoint, or `step-N`.

    Raises:
        InputError: It names no step.
    """
    if text is None:
        return None
    if text in (NEWEST, "last", "latest"):
        return True
    if not re.fullmatch(r"step-\d+", text):
        raise InputError(
            "bad_resume",
            f"{text!r} names no checkpoint",
            where="--resume",
            fix="write --resume alone for the newest, or --resume step-100",
        )
    return text


def split_arguments(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Splits the words of a command into a config file and overrides.

    Raises:
        InputError: Two words are neither.
    """
    path: Path | None = None
    overrides: list[str] = []
    for word in words:
        if "=" in word and not (path is None and Path(word).is_file()):
            overrides.append(word)
        elif path is None:
            path = Path(word)
        else:
            raise InputError(
                "two_configs",
                f"{word!r} is no key=value, and {path} is the configuration already",
                where="command line",
                fix="give one configuration file, then overrides as key=value",
            )
    return path, overrides
