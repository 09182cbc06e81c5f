"""`glasstune merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glasstune.cli.app import app
from glasstune.cli.common import (
    CheckpointOption,
    DeviceOption,
    JsonOption,
    TrustOption,
    console,
    emit,
    progress,
)


@app.command()
def merge(
    run_or_adapter: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_ADAPTER",
            help="Run folder, adapter folder in PEFT's format, or the hub id of an adapter.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            help="Folder, hub id or GGUF file of the base; the one that the adapter names else.",
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="NAME", help="Type of the weights: bfloat16, float16 or float32."),
    ] = "bfloat16",
    onto: Annotated[
        str,
        typer.Option(
            metavar="original|training",
            help="The base's own weights, or what the run's 8- or 4-bit storage made of them.",
        ),
    ] = "original",
    max_kl: Annotated[
        float,
        typer.Option(
            metavar="NATS",
            help="Largest mean divergence of the merged model from base and adapter apart.",
        ),
    ] = 0.001,
    no_certificate: Annotated[
        bool, typer.Option("--no-certificate", help="Do not compare them.")
    ] = False,
    gguf: Annotated[
        str | None, typer.Option(metavar="f16,q8_0", help="Write GGUF files too, with commas.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that is in the output folder.")
    ] = False,
    trust_remote_code: TrustOption = False,
    device: DeviceOption = None,
    json: JsonOption = None,
) -> None:
    """Merge an adapter into its base, with a certificate that both say the same.

    Ends with 1 where they do not: the output is then not there.
    """
    from glasstune.workflows.merge import merge as workflow

    bars = progress()
    try:
        record = workflow(
            run_or_adapter,
            output,
            base=base,
            checkpoint=checkpoint,
            dtype=dtype,
            onto=onto,
            max_kl=max_kl,
            certificate=not no_certificate,
            gguf=[] if gguf is None else [word.strip() for word in gguf.split(",")],
            force=force,
            trust_remote_code=trust_remote_code,
            device=device or "auto",
            progress=bars,
        )
    finally:
        bars.close()
    from glasstune.reports.merge_text import print_merge

    content = record.to_dict()
    print_merge(content, console(json))
    emit(content, json)
