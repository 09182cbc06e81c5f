"""`glasstune evaluate`: a model and a file in, loss, accuracy and judged answers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from glasstune.core.choices import Choices
from glasstune.core.config import DataConfig, SourceConfig
from glasstune.core.errors import InputError
from glasstune.core.protocols import Progress
from glasstune.core.records import EvaluateRecord
from glasstune.data.sources import source_files
from glasstune.data.write import write_rows
from glasstune.workflows.generate import check_output
from glasstune.workflows.judging import judge, measure_losses, prepare_rows
from glasstune.workflows.open_model import OpenModel, open_model, say_warnings

if TYPE_CHECKING:
    from glasstune.generation.metrics import Metric


def evaluate(
    run_or_model: str,
    data: str | Sequence[Mapping[str, Any]],
    *,
    checkpoint: str | None = None,
    no_adapter: bool = False,
    bits: int | None = None,
    batch_size: int = 8,
    generate: bool = False,
    metric: str | None = None,
    compare: str | None = None,
    output: str | Path | None = None,
    max_new_tokens: int = 256,
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
        generate: Whether answers are generated (most likely token each time) and judged too.
        metric: How: `exact_match` (the default), `contains`, `json_valid` or `FILE.py:function`;
            several with commas.
        compare: `base` measures the model without its adapter as well.
        output: JSON lines file for the answers, one row each.
        max_new_tokens: Longest answer in tokens.
        progress: Bars and log.
        **overrides: `dtype`, `device`, `trust_remote_code` of the model; `max_length`,
            `chat_template` and `format` of the data.

    Returns:
        The record. Losses are sums over trained tokens divided by their number, in nats.

    Raises:
        InputError: Model, data or options are wrong, or no row has a token to measure.
    """
    ask = Asked(generate, metric, compare, None if output is None else Path(output))
    ask.check(data, no_adapter)
    if batch_size < 1 or max_new_tokens < 1:
        name, value = (
            ("batch-size", batch_size) if batch_size < 1 else ("max-new-tokens", max_new_tokens)
        )
        raise InputError(
            "bad_option", f"{name.replace('-', '_')} is {value}", where=f"--{name}",
            fix="use 1 or more",
        )  # fmt: skip
    if not isinstance(data, str):
        with TemporaryDirectory() as folder:
            file = write_rows(data, Path(folder) / "rows.jsonl")
            return evaluate(
                run_or_model, str(file), checkpoint=checkpoint, no_adapter=no_adapter, bits=bits,
                batch_size=batch_size, generate=generate, metric=metric, compare=compare,
                output=output, max_new_tokens=max_new_tokens, progress=progress, **overrides,
            )  # fmt: skip
    mine = {key: overrides.pop(key, None) for key in ("max_length", "chat_template", "format")}
    choices = Choices()

    def opening(without: bool) -> OpenModel:
        return open_model(
            run_or_model, checkpoint=checkpoint, no_adapter=without, choices=choices, bits=bits,
            **overrides,
        )  # fmt: skip

    metrics = ask.metrics()  # a wrong name must not cost the load
    source_files(SourceConfig(path=data), Path("."))
    opened = opening(no_adapter)
    has_adapter = opened.location.adapter is not None and not no_adapter
    if compare is not None and not has_adapter:
        raise InputError(
            "nothing_to_compare",
            "there is no adapter, so base and model are the same",
            where="--compare",
            fix="name a run or an adapter, or leave --compare out",
        )
    say_warnings(opened, progress)
    config = data_config(opened, data, **mine)
    if not generate and compare is None:
        return evaluate_opened(opened, config, batch_size=batch_size, progress=progress)
    return judge(
        opened, prepare_rows(opened, config, progress), metrics,
        tuned=has_adapter, generate=generate, output=ask.output,
        base=None if compare is None else lambda: opening(True),
        batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress,
    )  # fmt: skip


def evaluate_opened(
    opened: OpenModel,
    config: DataConfig,
    *,
    batch_size: int,
    progress: Progress | None,
) -> EvaluateRecord:
    """`evaluate` for a model that is open already."""
    prepared = prepare_rows(opened, config, progress)
    return measure_losses(opened, prepared, batch_size, progress)


@dataclass(frozen=True)
class Asked:
    """What is asked for beside the loss; see `evaluate`."""

    generate: bool
    metric: str | None
    compare: str | None
    output: Path | None

    def check(self, data: str | Sequence[Mapping[str, Any]], no_adapter: bool) -> None:
        """Refuses what does not go together, before anything is loaded.

        Raises:
            InputError: Names the option.
        """
        for name, value in (("--metric", self.metric), ("--output", self.output)):
            if value is not None and not self.generate:
                raise InputError(
                    "needs_generate",
                    f"{name} is about generated answers, and none are asked for",
                    where=name,
                    fix="add --generate",
                )
        if self.compare not in (None, "base"):
            raise InputError(
                "bad_compare",
                f"{self.compare!r} is nothing to compare with",
                where="--compare",
                fix="use --compare base: the same model without its adapter",
            )
        if self.compare is not None and no_adapter:
            raise InputError(
                "nothing_to_compare",
                "--no-adapter measures the base alone",
                where="--compare",
                fix="leave one of them out",
            )
        if self.output is not None:
            check_output(self.output, Path(data) if isinstance(data, str) else None)

    def metrics(self) -> dict[str, Metric]:
        """Returns the metrics that judge answers; none without `generate`."""
        from glasstune.generation.metrics import load_metrics

        return load_metrics(self.metric or "exact_match") if self.generate else {}


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
    # Opened without a template: the rows decide, as they do in training, or are refused.
    bare = template.kind == "none" and not opened.tokenizer.chat_template
    values |= {
        # A saved template travels in the tokenizer; only these two are rules of their own.
        "chat_template": None if template.kind == "jinja" or bare else template.kind,
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
