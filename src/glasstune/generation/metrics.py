"""Metrics of generated answers: each gives a number for one answer; a mean is reported."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glasstune.core.errors import InputError
from glasstune.core.user_code import import_function

Row = Mapping[str, Any]
Metric = Callable[[str, str, Row], float]
"""(answer, reference, row of the data) to a number, 1 for right and 0 for wrong."""


def exact_match(answer: str, reference: str, row: Row) -> float:
    """1 where the answer is the reference, but for white space at its ends."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str, row: Row) -> float:
    """1 where the reference, without white space at its ends, stands somewhere in the answer."""
    return float(reference.strip() in answer)


def json_valid(answer: str, reference: str, row: Row) -> float:
    """1 where the whole answer is JSON by its standard (RFC 8259: no NaN, no Infinity)."""
    try:
        json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


BUILT_IN: dict[str, Metric] = {
    "exact_match": exact_match,
    "contains": contains,
    "json_valid": json_valid,
}

TAKEN = ("answer", "answers", "eval_loss", "perplexity", "token_accuracy", "tokens")
"""Keys of the record and of the file of answers: a metric of that name would overwrite them."""

_WHERE = "--metric"
_EXAMPLE = "my_file.py:my_metric"


def load_metrics(names: str) -> dict[str, Metric]:
    """Finds metrics by name.

    Args:
        names: Of `BUILT_IN`, or `FILE.py:function`; several with commas. A function takes
            (answer, reference) or (answer, reference, row) and returns a number or a bool.

    Raises:
        InputError: An unknown or repeated name, or a file or function that cannot be used.
    """
    found: dict[str, Metric] = {}
    for text in (part.strip() for part in names.split(",")):
        name = text.rpartition(":")[2] if ".py:" in text else text
        if name in found:
            raise InputError(
                "metric_twice", f"two metrics are named {name!r}", where=_WHERE, fix="leave one out"
            )
        if name in TAKEN:
            raise InputError(
                "metric_name_taken",
                f"{name!r} is a number or text of the record itself",
                where=_WHERE,
                fix=f"give the function another name than {', '.join(TAKEN)}",
            )
        if ".py:" in text:
            found[name] = _checked(text)
        elif text in BUILT_IN:
            found[name] = BUILT_IN[text]
        else:
            raise InputError(
                "unknown_metric",
                f"there is no metric {text!r}",
                where=_WHERE,
                fix=f"use {', '.join(BUILT_IN)} or your own, as {_EXAMPLE}",
            )
    return found


def _checked(spec: str) -> Metric:
    """Wraps a user's function: 2 or 3 arguments in, a finite number out."""
    function = import_function(spec, where=_WHERE, example=_EXAMPLE)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        takes_row = True
    else:
        takes_row = _binds(signature, 3)
        if not takes_row and not _binds(signature, 2):
            raise InputError(
                "metric_arguments",
                f"{spec} takes {signature}",
                where=_WHERE,
                fix="let it take (answer, reference) or (answer, reference, row)",
            )

    def run(answer: str, reference: str, row: Row) -> float:
        try:
            value = function(answer, reference, row) if takes_row else function(answer, reference)
        except Exception as error:  # a user's function can raise anything
            raise InputError(
                "metric_fails",
                f"{spec} raised {type(error).__name__}: {error}",
                where=_WHERE,
                fix="let it give a number for every answer, also for an empty one",
            ) from error
        number = _number(value)
        if number is None:
            raise InputError(
                "metric_no_number",
                f"{spec} returned {value!r}, not a number",
                where=_WHERE,
                fix="return True or False, or a finite number",
            )
        return number

    return run


def _number(value: Any) -> float | None:
    """A bool, a number or an array of one value as a finite float; None for anything else."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # more than one value, or too big
        return None
    return number if math.isfinite(number) else None


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def score(
    metrics: Mapping[str, Metric],
    answers: Sequence[str],
    references: Sequence[str],
    rows: Sequence[Row],
    origins: Sequence[str],
) -> list[dict[str, float]]:
    """Judges answers one by one.

    Returns:
        Per answer the value of each metric.

    Raises:
        InputError: A user's function failed; names the row.
    """
    scores = []
    for answer, reference, row, origin in zip(answers, references, rows, origins, strict=True):
        try:
            scores.append({name: run(answer, reference, row) for name, run in metrics.items()})
        except InputError as error:
            raise InputError(
                error.code, f"{error.message} (at {origin})", where=error.where, fix=error.fix
            ) from error
    return scores


def means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each metric; nothing without a score."""
    if not scores:
        return {}
    return {name: math.fsum(part[name] for part in scores) / len(scores) for name in scores[0]}
