"""Commands that use a model: `generate`, `evaluate`, `demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

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
    show,
)
from glasstune.core.errors import InputError

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL", help="Run folder, adapter, model folder, GGUF file or hub id."
    ),
]


@app.command()
def generate(
    run_or_model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to answer.")] = None,
    input: Annotated[
        Path | None, typer.Option(metavar="F.jsonl", help="Rows with `prompt` or `messages`.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="G.jsonl", help="Where rows and answers go.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest answer in tokens.")
    ] = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts in one forward.")] = 8,
    checkpoint: CheckpointOption = None,
    no_adapter: NoAdapterOption = False,
    bits: BitsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = None,
) -> None:
    """Answer one prompt, or every row of a file."""
    if (prompt is None) == (input is None) or (input is None) != (output is None):
        raise InputError(
            "prompt_or_input",
            "give either --prompt TEXT, or --input F.jsonl with --output G.jsonl",
            where="command line",
            fix="see glasstune generate --help",
        )
    from glasstune.workflows import generate as workflow

    options = set_options(
        system=system, checkpoint=checkpoint, no_adapter=no_adapter, bits=bits, dtype=dtype,
        device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    options |= {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "batch_size": batch_size,
        "progress": progress(),
    }
    if input is not None and output is not None:
        record = workflow.generate_file(run_or_model, input, output, **options)
        sys.stderr.write(f"{record['rows']} answers in {record['output']}\n")
        emit(record, json)
        return
    answers = workflow.generate(run_or_model, [str(prompt)], **options)
    if json != "-":
        typer.echo(answers[0])
    emit({"answers": answers}, json)


@app.command()
def evaluate(
    run_or_model: ModelArgument,
    data: Annotated[str, typer.Option(metavar="F", help="File, glob or hub id.")],
    checkpoint: CheckpointOption = None,
    no_adapter: NoAdapterOption = False,
    bits: BitsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Rows in one forward; the numbers do not depend on it.")
    ] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", help="Longest document in tokens; the run's by default."),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Template name or file; the run's by default."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(metavar="NAME", help="Shape of the rows; auto by default.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Generate answers and judge them, too.")
    ] = False,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="exact_match, contains, json_valid or FILE.py:fn; several with commas.",
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="base", help="Measure the base alone as well.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="G.jsonl", help="Where the generated answers go.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest generated answer in tokens.")
    ] = 256,
    json: JsonOption = None,
) -> None:
    """Measure loss and token accuracy on rows of a file, and judge generated answers."""
    from glasstune.workflows.evaluate import evaluate as workflow

    options = set_options(
        checkpoint=checkpoint, no_adapter=no_adapter, bits=bits, dtype=dtype, device=device,
        trust_remote_code=trust_remote_code, max_length=max_length, chat_template=chat_template,
        format=format, generate=generate, metric=metric, compare=compare, output=output,
    )  # fmt: skip
    record = workflow(
        run_or_model, data, batch_size=batch_size, max_new_tokens=max_new_tokens,
        progress=progress(), **options,
    )  # fmt: skip
    show("evaluate", record.to_dict(), json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where data set and run go.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of updates.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Show the whole road on a CPU in a few minutes: data, model, training, answers."""
    from glasstune.workflows.demo import demo as workflow

    bars = progress()
    try:
        record = workflow(out, steps, bars)
    finally:
        bars.close()
    emit(record, json)
