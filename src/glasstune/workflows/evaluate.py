"""`glasstune evaluate`: a model and a file in, loss, perplexity and token accuracy out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from glasstune.core.choices import Choices
from glasstune.core.config import DataConfig, SourceConfig
from glasstune.core.errors import InputError
from glasstune.core.protocols import Progress
from glasstune.core.records import EvaluateRecord
from glasstune.data.write import write_rows
from glasstune.workflows.open_model import OpenModel, open_model, say_warnings


def evaluate(
    run_or_model: str,
    data: str | Sequence[Mapping[str, Any]],
    *,
    checkpoint: str | None = None,
    no_adapter: bool = False,
    bits: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
    **overrides: Any,
) -> EvaluateRecord:
    """Measures a model on rows that it was not trained on.

    Args:
        run_or_model: Run folder, adapter folder, model folder, GGUF file or hub id.
        data: File, glob or hub id; or rows from Python.
        checkpoint: `best`, `last` or `step-N` of a run.
        no_adapter: Measures the base alone, with the run's template and precision.
        bits: Precision of the base; None = the run's, or 16.
        batch_size: Rows in one forward; the numbers do not depend on it.
        progress: Bars and log.
        **overrides: `dtype`, `device`, `trust_remote_code` of the model; `max_length`,
            `chat_template` and `format` of the data.

    Returns:
        The record. Losses are sums over trained tokens divided by their number, in nats.

    Raises:
        InputError: Model or data are wrong, or no row has a token to measure.
    """
    if batch_size < 1:
        raise InputError(
            "bad_option", f"batch_size is {batch_size}", where="--batch-size", fix="use 1 or more"
        )
    if not isinstance(data, str):
        with TemporaryDirectory() as folder:
            file = write_rows(data, Path(folder) / "rows.jsonl")
            return evaluate(
                run_or_model, str(file), checkpoint=checkpoint, no_adapter=no_adapter, bits=bits,
                batch_size=batch_size, progress=progress, **overrides,
            )  # fmt: skip
    mine = {key: overrides.pop(key, None) for key in ("max_length", "chat_template", "format")}
    choices = Choices()
    opened = open_model(
        run_or_model, checkpoint=checkpoint, no_adapter=no_adapter, choices=choices, bits=bits,
        **overrides,
    )  # fmt: skip
    say_warnings(opened, progress)
    config = data_config(opened, data, **mine)
    return evaluate_opened(opened, config, batch_size=batch_size, progress=progress)


def evaluate_opened(
    opened: OpenModel,
    config: DataConfig,
    *,
    batch_size: int,
    progress: Progress | None,
) -> EvaluateRecord:
    """`evaluate` for a model that is open already."""
    from glasstune.data.loader import evaluation_batches
    from glasstune.data.prepare import prepare_data
    from glasstune.data.tokenizer import pad_id
    from glasstune.generation import evaluate_rows
    from glasstune.kernels.linear_cross_entropy import token_losses

    prepared = prepare_data(
        config, opened.tokenizer, opened.facts, seed=0, choices=opened.choices, progress=progress
    )
    if progress is not None:
        for finding in prepared.record.findings:
            progress.say(f"{finding.severity}: {finding.where}: {finding.message}")
        lost = {reason: count for reason, count in prepared.record.dropped.items() if count}
        if lost:
            reasons = ", ".join(f"{count} {reason}" for reason, count in lost.items())
            progress.say(f"warning: rows left out of the measurement: {reasons}")
    sums = evaluate_rows(
        opened.model,
        evaluation_batches(prepared.train, batch_size, pad_id(opened.tokenizer)),
        split=opened.split,
        token_losses=token_losses,
        vocabulary=opened.vocabulary,
        device=opened.device,
        precision=opened.precision,
        progress=progress,
        rows=prepared.train.rows,
    )
    if sums.tokens == 0:
        raise InputError(
            "nothing_to_measure",
            "no row has a token whose prediction counts",
            where=config.sources[0].path,
            fix="give rows with answers that fit max_length",
        )
    return sums.to_record(prepared.sources)


def data_config(
    opened: OpenModel,
    data: str,
    *,
    max_length: int | None = None,
    chat_template: str | None = None,
    format: str | None = None,
) -> DataConfig:
    """Settings for the rows to measure: the run's own where there is a run.

    A row must become the ids that training would have made of it, so template, its variables,
    what is trained and the longest length are taken over; only sources and split are new.
    """
    run = opened.location.data
    limit = opened.facts.max_positions
    source: dict[str, Any] = {"path": data}
    if run is None:
        values: dict[str, Any] = {
            "max_length": min(1024, limit) if limit is not None else 1024,
            "packing": opened.facts.can_pack,
        }
    else:
        values = run.model_dump(exclude={"sources", "validation", "validation_split"})
        values |= {"duplicates": "keep", "num_workers": 0}
        first = run.sources[0]
        source |= {"format": first.format, "columns": first.columns}
        if first.columns:
            opened.choices.record("data.columns", first.columns, "those of the run's first source")
    template = opened.template
    values |= {
        # A saved template travels in the tokenizer; only these two are rules of their own.
        "chat_template": None if template.kind == "jinja" else template.kind,
        "chat_template_kwargs": dict(template.kwargs),
    }
    if template.kind == "baichuan2":
        values["markers"] = dict(template.markers)
    if format is not None:
        source["format"] = format
    values |= {
        key: value
        for key, value in (("max_length", max_length), ("chat_template", chat_template))
        if value is not None
    }
    return DataConfig(sources=[SourceConfig(**source)], validation_split=0.0, **values)
