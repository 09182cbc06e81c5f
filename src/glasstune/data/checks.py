"""What the data check says beyond bad rows: findings about template, cuts, overlap and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glasstune.core.batch import Document
from glasstune.core.findings import Finding
from glasstune.data.encode import Encoded
from glasstune.data.formats import Example
from glasstune.data.ledger import Ledger
from glasstune.data.read import ReadStats
from glasstune.data.template import ChatTemplate
from glasstune.data.tokenizer import end_id


def note_row(ledger: Ledger, origin: str, row: Encoded) -> None:
    """Notes what encoding a row showed."""
    if row.drifted:
        ledger.note(
            "template_drift",
            "warning",
            origin,
            "in {count} rows the ids before an answer are not those that the same conversation has "
            "when the answer is generated",
            "where the prompt opens with thoughts that the answers lack, set "
            "data.chat_template_kwargs: {enable_thinking: false}; where earlier turns differ "
            "(Qwen3), data.train_on: last_assistant",
        )
    if row.split:
        ledger.note(
            "answer_tokenised_apart",
            "info",
            origin,
            "in {count} rows the tokenizer would join the start of the last answer with its "
            "prompt; they are tokenised apart, so that the prompt's ids are those of generation",
        )
    if row.silent_tools:
        ledger.note(
            "tools_not_rendered",
            "warning",
            origin,
            "{count} rows list tools, which the chat template does not show to the model",
            "use a template with tools (data.chat_template: FILE)",
        )


def note_answer(ledger: Ledger, example: Example) -> None:
    """Notes an answer without a letter: an empty cell of a table looks like a meant one."""
    last = example.messages[-1] if example.messages else {}
    text = example.completion if example.kind == "pair" else last.get("content")
    if example.kind != "text" and not last.get("tool_calls") and not str(text or "").strip():
        ledger.note(
            "empty_answer",
            "warning",
            example.origin,
            "{count} rows have an empty answer: they teach the model to say nothing",
            "take them out, unless that is meant",
        )


def note_cut(ledger: Ledger, origin: str, length: int, limit: int) -> None:
    """Notes a row that was cut."""
    ledger.note(
        "cut",
        "warning",
        origin,
        f"{{count}} rows are longer than max_length {limit} and were cut (a cut answer gets no end "
        f"token); the first has {length} tokens",
        "raise data.max_length to train them whole",
    )


def note_overlap(
    ledger: Ledger, pairs: Sequence[tuple[Document, bytes]], border: int, training: set[bytes]
) -> None:
    """Notes validation rows whose text is also trained.

    Args:
        ledger: The books.
        pairs: All documents with their text keys.
        border: First source index of the validation files.
        training: Text keys of the training rows.
    """
    for document, key in pairs:
        if document.source >= border and key in training:
            ledger.note(
                "validation_overlap",
                "warning",
                document.origin,
                "{count} validation rows have the text of a training row, so the held-out loss is "
                "too good",
                "take them out of one side",
            )


def report(
    ledger: Ledger, stats: ReadStats, template: ChatTemplate, seen_ids: NDArray[np.bool_]
) -> None:
    """Adds the findings that concern the whole data set."""
    for path, count in stats.blank_lines.items():
        message = f"{count} blank lines were passed over"
        ledger.findings.append(Finding("blank_lines", "info", path, message))
    where = f"chat template ({template.name})"
    if template.pinned_date is not None:
        ledger.findings.append(
            Finding(
                "template_reads_clock",
                "warning",
                where,
                f"the template writes today's date; it is pinned to {template.pinned_date}, so "
                "that a resume and generation see the same ids",
                "another date: data.chat_template_kwargs {pinned_date: ...} or the template's own "
                "variable (Llama 3: date_string)",
            )
        )
    if template.kind == "jinja" and not template.traits.has_generation_prompt:
        ledger.findings.append(
            Finding(
                "no_generation_prompt",
                "warning",
                where,
                "the template ignores add_generation_prompt, so the header of the assistant's turn "
                "is trained and generated as part of the answer",
                "give a template that knows add_generation_prompt (data.chat_template: FILE)",
            )
        )
    if end_id(template.tokenizer) is None and not template.traits.end_tokens:
        ledger.findings.append(
            Finding(
                "no_end_token",
                "warning",
                "tokenizer",
                "the tokenizer has no end token, so no answer ends: the model will not stop",
                "set eos_token in its tokenizer_config.json",
            )
        )
    _own_tokens(ledger, template, seen_ids)


def _own_tokens(ledger: Ledger, template: ChatTemplate, seen_ids: NDArray[np.bool_]) -> None:
    """Names added tokens of the data that neither the template nor the tokenizer's roles use.

    Such tokens are most likely the user's own, with embedding rows that nobody has trained; LoRA
    on the linear layers leaves those rows as they are.
    """
    tokenizer = template.tokenizer
    named = {str(value) for value in tokenizer.special_tokens_map.values()}
    used = [
        (token, index)
        for token, index in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
        if index < len(seen_ids)
        and seen_ids[index]
        and token not in named
        and not any(token in source for source in template.source)
    ]
    if used:
        listed = ", ".join(f"{token!r} ({index})" for token, index in used[:10])
        ledger.findings.append(
            Finding(
                "added_tokens_used",
                "warning",
                "tokenizer",
                f"the data uses {len(used)} added tokens: {listed}; LoRA does not train their "
                "embedding rows",
                "where they are new, train their rows: adapter.trainable_token_indices: "
                f"{[index for _, index in used[:10]]}",
            )
        )
