"""What the data check says beyond bad rows, row by row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from glasstune.core.batch import IGNORED
from glasstune.data.encode import Encoded
from glasstune.data.formats import Example
from glasstune.data.tally import Tally
from glasstune.data.template import ChatTemplate
from glasstune.data.texts import mojibake
from glasstune.data.tokenizer import end_id


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What rows are compared with.

    Args:
        ends: Ids at which an answer may end; empty where the tokenizer has none.
        begin: The begin token's id, or None.
        unknown: The unknown token's id, or None.
        unknown_text: The unknown token itself, which a text may hold on purpose.
        kind: Of the template.
    """

    ends: frozenset[int]
    begin: int | None
    unknown: int | None
    unknown_text: str
    kind: str

    @classmethod
    def of(cls, template: ChatTemplate) -> RowFacts:
        """Reads them from a template and its tokenizer."""
        tokenizer = template.tokenizer
        ends, unknown = frozenset(template.stop_ids), tokenizer.unk_token_id
        # Where the unknown token is the end token as well (GPT-2), it says nothing.
        plain = isinstance(unknown, int) and unknown not in ends
        begin = tokenizer.bos_token_id
        return cls(
            ends,
            begin if isinstance(begin, int) else None,
            unknown if plain else None,
            str(tokenizer.unk_token),
            template.kind,
        )

    def note(self, tally: Tally, example: Example, row: Encoded, *, whole: bool) -> None:
        """Notes what a row's tokens show.

        Args:
            tally: The counts.
            example: The row's texts.
            row: Its tokens, cut where it was too long.
            whole: Whether it was not cut.
        """
        note_row(tally, example.origin, row)
        note_answer(tally, example)
        if example.kind != "text" and self.kind == "jinja":
            tally.count("chats")
            if not any(message["role"] == "system" for message in example.messages):
                tally.count("without_system")
        if row.ids[:2] == [self.begin] * 2:
            tally.note(
                "double_bos",
                "warning",
                example.origin,
                "{count} rows start with two begin tokens",
                "take the begin token out of the chat template or of the texts; one is enough",
            )
        if whole and self.ends and self.kind != "baichuan2" and _last(row) not in self.ends:
            tally.note(
                "end_not_trained",
                "warning",
                example.origin,
                "{count} rows do not train an end token, so they do not teach the model to stop",
                "use a chat template that closes each answer (data.chat_template: chatml, or FILE)",
            )
        if self.unknown in row.ids and not any(
            self.unknown_text in text for text in example.texts()
        ):
            tally.note(
                "unknown_tokens",
                "warning",
                example.origin,
                "{count} rows hold characters that the tokenizer maps to its unknown token "
                f"({self.unknown_text}): their text is lost",
                "use a model whose tokenizer knows the script, or take the characters out",
            )


def _last(row: Encoded) -> int:
    return next((label for label in reversed(row.labels) if label != IGNORED), IGNORED)


def note_row(tally: Tally, origin: str, row: Encoded) -> None:
    """Notes what encoding a row showed."""
    if row.drifted:
        tally.note(
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
        tally.note(
            "answer_tokenised_apart",
            "info",
            origin,
            "in {count} rows the tokenizer would join the start of the last answer with its "
            "prompt; they are tokenised apart, so that the prompt's ids are those of generation",
        )
    if row.silent_tools:
        tally.note(
            "tools_not_rendered",
            "warning",
            origin,
            "{count} rows list tools, which the chat template does not show to the model",
            "use a template with tools (data.chat_template: FILE)",
        )


def note_answer(tally: Tally, example: Example) -> None:
    """Notes an answer without a letter: an empty cell of a table looks like a meant one."""
    last = example.messages[-1] if example.messages else {}
    text = example.completion if example.kind == "pair" else last.get("content")
    if example.kind != "text" and not last.get("tool_calls") and not str(text or "").strip():
        tally.note(
            "empty_answer",
            "warning",
            example.origin,
            "{count} rows have an empty answer: they teach the model to say nothing",
            "take them out, unless that is meant",
        )


def note_cut(tally: Tally, origin: str, length: int, limit: int) -> None:
    """Notes a row that was cut."""
    tally.note(
        "cut",
        "warning",
        origin,
        f"{{count}} rows are longer than max_length {limit} and were cut (a cut answer gets no end "
        f"token); the first has {length} tokens",
        "raise data.max_length to train them whole",
    )


def drop_untrained(tally: Tally, origin: str) -> None:
    """Counts a row that the loss would see nothing of."""
    tally.drop("no_trained_tokens")
    tally.note(
        "no_trained_tokens",
        "warning",
        origin,
        "{count} rows have no trained token (the answer is cut off or missing) and are left out",
        "raise data.max_length, or look at these rows",
    )


def note_texts(tally: Tally, origin: str, texts: Sequence[str], control: re.Pattern[str]) -> None:
    """Notes control tokens and traces of a wrong encoding in a row's texts.

    Args:
        tally: The counts.
        origin: The row.
        texts: Its texts.
        control: Pattern of the tokenizer's added and special tokens.
    """
    for text in texts:
        if found := control.search(text):
            tally.note(
                "control_token_in_text",
                "warning",
                origin,
                f"the texts of {{count}} rows hold control tokens (the first: "
                f"{found.group()!r}), which the tokenizer reads as such",
                "remove them from the rows, unless they are meant",
            )
            break
    for text in texts:
        if wrong := mojibake(text):
            tally.note(
                "mojibake",
                "warning",
                origin,
                f"the texts of {{count}} rows were read in a wrong encoding once (the first holds "
                f"{wrong!r})",
                "make the file again from its source with the right encoding",
            )
            break


def end_missing(template: ChatTemplate) -> bool:
    """Tells whether no answer can end: neither tokenizer nor template has an end token."""
    return end_id(template.tokenizer) is None and not template.traits.end_tokens
