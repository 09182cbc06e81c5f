"""Rows of data as questions: what is asked, and the answer that the row has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glasstune.core.errors import InputError
from glasstune.data.choose import OpenSource
from glasstune.data.encode import encode_prompt
from glasstune.data.errors import RowError
from glasstune.data.formats import Example, to_example
from glasstune.data.read import BadRow, ReadStats
from glasstune.data.template import ChatTemplate
from glasstune.data.work import input_join


@dataclass(frozen=True)
class Question:
    """One row to answer.

    Args:
        source: Index of its source.
        origin: `file:line` or `file[row]`.
        prompt: What is asked: a text, or messages that end with the user's or a tool's turn.
        ids: Its tokens, up to where the answer starts.
        reference: The row's own last answer.
        row: The row as it was read.
    """

    source: int
    origin: str
    prompt: str | list[dict[str, Any]]
    ids: list[int]
    reference: str
    row: Mapping[str, Any]


def read_questions(
    sources: Sequence[OpenSource], template: ChatTemplate, max_positions: int | None
) -> tuple[list[Question], dict[str, int]]:
    """Reads every row that has a question and an answer of text.

    Rows are rendered as training renders them, so a question has the ids that it has there. Only
    the last answer of a conversation is asked for. Rows that cannot be read or rendered were
    reported when the loss was measured; here they are counted.

    Args:
        sources: Opened.
        template: The run's template.
        max_positions: Longest row that the model can place.

    Returns:
        The questions, and how many rows are none, by reason.

    Raises:
        InputError: `no_questions`: the rows are plain texts, or none is left.
    """
    found: list[Question] = []
    left_out: dict[str, int] = {}
    join = input_join(template)
    for number, source in enumerate(sources):
        if source.format == "text":
            raise InputError(
                "no_questions",
                "these rows are plain texts: there is nothing to answer",
                where=source.config.path,
                fix="leave --generate out, or give rows with questions and answers",
            )
        for raw in source.rows(ReadStats()):
            if isinstance(raw, BadRow):
                _count(left_out, "unreadable")
                continue
            try:
                example = to_example(
                    raw.value, raw.origin, source.format, source.config.columns, join=join
                )
                question = _question(number, example, template, raw.value)
            except RowError:
                _count(left_out, "unreadable")
                continue
            if question is None:
                _count(left_out, "answer is a call")
            elif max_positions is not None and len(question.ids) >= max_positions:
                _count(left_out, "too long")
            else:
                found.append(question)
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise InputError(
            "no_questions",
            f"no row can be asked: {reasons}",
            where=sources[0].config.path if sources else "",
            fix="give rows with a question and an answer of text",
        )
    return found, left_out


def _question(
    source: int, example: Example, template: ChatTemplate, row: Mapping[str, Any]
) -> Question | None:
    """Returns None where the last answer is not text.

    Raises:
        RowError: The template refuses it.
    """
    prompt: str | list[dict[str, Any]]
    if example.kind == "pair" and template.kind == "none":
        prompt, reference = example.prompt, example.completion
    else:
        last = example.messages[-1]
        if last.get("tool_calls") or not last["content"]:
            return None
        prompt = [dict(message) for message in example.messages[:-1]]
        reference = last["content"]
    ids = encode_prompt(template.tokenizer, template, prompt, tools=example.tools)
    return Question(source, example.origin, prompt, ids, reference, row)


def _count(reasons: dict[str, int], reason: str) -> None:
    reasons[reason] = reasons.get(reason, 0) + 1


def by_source(questions: Sequence[Question]) -> Iterator[tuple[int, list[int]]]:
    """Yields each source's index and the places of its questions."""
    for source in sorted({question.source for question in questions}):
        yield source, [at for at, question in enumerate(questions) if question.source == source]
