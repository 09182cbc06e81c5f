"""`glasstune inspect`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from glasstune.cli.app import app
from glasstune.cli.common import JsonOption, TrustOption, console, emit, progress
from glasstune.core.errors import InputError

ALL_LINEAR = "all-linear"


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, model folder, config.json, GGUF file, run or adapter folder, or a "
            "configuration (config.yaml).",
        ),
    ],
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="16,8,4", help="Precisions, in the order of the columns; all by default."
        ),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES|REGEX|all-linear",
            help="Where LoRA goes: names with commas, or one regular expression for whole paths; "
            "the run's, or all-linear.",
        ),
    ] = None,
    r: Annotated[
        int | None, typer.Option("--r", min=1, metavar="N", help="Rank; the run's, or 16.")
    ] = None,
    skip_modules: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Modules that stay at 16 bit, with commas: llm_int8_skip_modules, which "
            "replaces transformers' own list.",
        ),
    ] = None,
    quant_type: Annotated[
        str | None, typer.Option(metavar="nf4|fp4", help="Type of the 4-bit weights.")
    ] = None,
    no_double_quant: Annotated[
        bool, typer.Option("--no-double-quant", help="Leave the 4-bit scales in float32.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="bfloat16, float16 or float32; the run's, or bfloat16."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Levels of the tree that are printed.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page too.")] = None,
    error: Annotated[
        bool,
        typer.Option("--error", help="Read the weights: each layer's error at 8 bit, NF4 and FP4."),
    ] = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = None,
) -> None:
    """Show a model at 16, 8 and 4 bit without its weights: tree, bytes, LoRA, traps.

    Ends with 0 whatever it finds: findings are its result. 2 where there is nothing to show.
    """
    from glasstune.workflows import inspect as workflow

    if html is not None:
        workflow.check_html(html)
    quantization: dict[str, Any] = {}
    if quant_type is not None:
        quantization["bnb_4bit_quant_type"] = quant_type
    if no_double_quant:
        quantization["bnb_4bit_use_double_quant"] = False
    bars = progress()
    try:
        result = workflow.inspect_model(
            model,
            read_bits(bits),
            target_modules=read_targets(target_modules),
            r=r,
            skip_modules=None if skip_modules is None else names(skip_modules, "--skip-modules"),
            quantization=quantization,
            dtype=dtype,
            error=error,
            trust_remote_code=trust_remote_code,
            depth=depth,
            progress=bars,
        )
    finally:
        bars.close()
    from glasstune.reports.inspect_tree import print_inspect

    record = result.to_dict()
    print_inspect(record, console(json), depth)
    if html is not None:
        bars.say(f"wrote {result.to_html(html)}")
    emit(record, json)


def read_bits(text: str | None) -> list[int] | None:
    """Reads `16,8,4`.

    Raises:
        InputError: Something else stands there, nothing, or one of them twice.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if any(word not in ("16", "8", "4") for word in words) or len(set(words)) != len(words):
        raise InputError(
            "bad_value",
            f"{text!r} is no list of precisions",
            where="--bits",
            fix="give 16, 8 and 4, or some of them, each once: --bits 16,4",
        )
    return [int(word) for word in words]


def read_targets(text: str | None) -> str | list[str] | None:
    """Reads names with commas, one regular expression, or `all-linear`."""
    if text is None or text.strip().lower() == ALL_LINEAR:
        return None if text is None else ALL_LINEAR
    listed = names(text, "--target-modules")
    # No module's name holds such a sign: PEFT takes a text for an expression, a list for names.
    return listed[0] if len(listed) == 1 and re.search(r"[^\w.-]", listed[0]) else listed


def names(text: str, where: str) -> list[str]:
    """Splits names at commas; those inside brackets belong to a regular expression.

    Raises:
        InputError: There is none, or one is empty.
    """
    found = [word.strip() for word in re.split(r",(?![^({\[]*[)}\]])", text)]
    if not all(found):
        raise InputError(
            "bad_value",
            f"{text!r} holds an empty name",
            where=where,
            fix=f"write names with commas: {where} q_proj,v_proj",
        )
    return found
