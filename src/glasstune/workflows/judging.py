"""Measures and judges one model, or a model with and without its adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.config import DataConfig
from glasstune.core.errors import InputError
from glasstune.core.files import dump_json, write_text_atomic
from glasstune.core.protocols import Progress
from glasstune.core.records import EvaluateRecord
from glasstune.workflows.open_model import OpenModel

if TYPE_CHECKING:
    from glasstune.data.prepare import PreparedData
    from glasstune.generation.metrics import Metric
    from glasstune.generation.questions import Question


def prepare_rows(opened: OpenModel, config: DataConfig, progress: Progress | None) -> PreparedData:
    """Reads the rows and says what was left out."""
    from glasstune.data.prepare import prepare_data

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
    return prepared


def measure_losses(
    opened: OpenModel, prepared: PreparedData, batch_size: int, progress: Progress | None
) -> EvaluateRecord:
    """Loss, perplexity and token accuracy of one model.

    Raises:
        InputError: No row has a token to measure.
    """
    from glasstune.data.loader import evaluation_batches
    from glasstune.data.tokenizer import pad_id
    from glasstune.generation import evaluate_rows
    from glasstune.kernels.linear_cross_entropy import token_losses

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
            where=prepared.config.sources[0].path,
            fix="give rows with answers that fit max_length",
        )
    return sums.to_record(prepared.sources)


def judge(
    opened: OpenModel,
    prepared: PreparedData,
    metrics: dict[str, Metric],
    *,
    tuned: bool,
    generate: bool,
    output: Path | None,
    base: Callable[[], OpenModel] | None,
    batch_size: int,
    max_new_tokens: int,
    progress: Progress | None,
) -> EvaluateRecord:
    """Measures losses, generates answers and judges them, on one or both sides.

    Args:
        opened: The model.
        prepared: Its rows.
        metrics: By name.
        tuned: Whether the model has an adapter.
        generate: Whether answers are generated.
        output: Where they go.
        base: Opens the model without its adapter; None = no comparison. Called only where the
            adapter cannot be switched off in memory.
        batch_size: Rows in one forward.
        max_new_tokens: Longest answer.
        progress: Bars and log.

    Raises:
        InputError: No row can be measured or asked, or a user's metric failed.
    """
    from glasstune.generation.chat import adapter_off, trains_biases

    questions = _questions(opened, prepared, progress) if generate else []
    one = "tuned" if tuned else "base"
    options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    sides = {one: _side(opened, prepared, questions, progress, one, options)}
    if base is not None:
        if trains_biases(opened.model):
            # Biases lie in the base itself: switched off, the adapter would leave them there.
            alone = base()
            sides["base"] = _side(alone, prepared, questions, progress, "base", options)
        else:
            with adapter_off(opened.model):
                sides["base"] = _side(opened, prepared, questions, progress, "base", options)
    try:
        for side in sides.values():
            side.scores = _scores(metrics, questions, side.answers)
    finally:  # a metric that fails must not cost the answers
        if output is not None:
            _write_answers(output, prepared, questions, sides)
    return _record(prepared, questions, sides, one)


def _questions(
    opened: OpenModel, prepared: PreparedData, progress: Progress | None
) -> list[Question]:
    from glasstune.generation.questions import read_questions

    questions, left_out = read_questions(
        prepared.opened, prepared.template, opened.facts.max_positions
    )
    if left_out and progress is not None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        progress.say(f"warning: rows without a judged answer: {reasons}")
    return questions


@dataclass
class Side:
    """What was found of one model: its losses, answers and their scores."""

    losses: EvaluateRecord
    answers: list[str]
    scores: list[dict[str, float]] = field(default_factory=list)


def _side(
    opened: OpenModel,
    prepared: PreparedData,
    questions: Sequence[Question],
    progress: Progress | None,
    name: str,
    options: Mapping[str, Any],
) -> Side:
    from glasstune.generation import generate_texts, stop_ids

    if progress is not None:
        progress.say(f"measuring the {name} model")
    losses = measure_losses(opened, prepared, options["batch_size"], progress)
    if not questions:
        return Side(losses, [])
    stops = {*stop_ids(opened.tokenizer, opened.model), *prepared.template.stop_ids}
    answers = generate_texts(
        opened.model, opened.tokenizer, [question.ids for question in questions],
        stops=sorted(stops), max_positions=opened.facts.max_positions, precision=opened.precision,
        progress=progress, **options,
    )  # fmt: skip
    return Side(losses, answers)


def _scores(
    metrics: Mapping[str, Metric], questions: Sequence[Question], answers: Sequence[str]
) -> list[dict[str, float]]:
    from glasstune.generation.metrics import score

    return score(
        metrics,
        answers,
        [question.reference for question in questions],
        [question.row for question in questions],
        [question.origin for question in questions],
    )


def _record(
    prepared: PreparedData, questions: Sequence[Question], sides: Mapping[str, Side], one: str
) -> EvaluateRecord:
    """The contract's record: the evaluated model's losses, and each side's metrics."""
    from glasstune.generation.metrics import means
    from glasstune.generation.questions import by_source

    record = sides[one].losses
    for name, side in sides.items():
        losses = side.losses
        found: dict[str, Any] = {
            "eval_loss": losses.eval_loss,
            "perplexity": losses.perplexity,
            "token_accuracy": losses.token_accuracy,
        }
        if questions:
            found |= {**means(side.scores), "answers": len(questions)}
        record.metrics[name] = found
        prefix = "" if name == one else f"{name}_"
        if prefix:
            for source, values in losses.by_source.items():
                record.by_source[source] |= {
                    f"{prefix}{key}": values[key] for key in ("eval_loss", "token_accuracy")
                }
        for source_index, places in by_source(questions):
            values = means([side.scores[at] for at in places])
            record.by_source.setdefault(prepared.sources[source_index], {}).update(
                {f"{prefix}{key}": value for key, value in values.items()}
            )
    return record


def _write_answers(
    path: Path,
    prepared: PreparedData,
    questions: Sequence[Question],
    sides: Mapping[str, Side],
) -> None:
    """One JSON object a question, in the order of the data."""
    lines = []
    for at, question in enumerate(questions):
        key = "prompt" if isinstance(question.prompt, str) else "messages"
        row: dict[str, Any] = {
            "source": prepared.sources[question.source],
            "origin": question.origin,
            key: question.prompt,
            "reference": question.reference,
        }
        for name, side in sides.items():
            row[name] = {"answer": side.answers[at], **(side.scores[at] if side.scores else {})}
        lines.append(dump_json(row))
    write_text_atomic(path, "".join(f"{line}\n" for line in lines))
