"""What the data check says about the data as a whole: template, tokenizer, repeated texts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from glasstune.core.batch import IntArray
from glasstune.core.findings import Finding
from glasstune.data.checks import end_missing
from glasstune.data.documents import Store
from glasstune.data.errors import RowError
from glasstune.data.ledger import Ledger
from glasstune.data.split import HELD_OUT, LEFT_OUT, TRAINED, Part, Sides
from glasstune.data.tally import PLACES, Note, Tally
from glasstune.data.template import ChatTemplate

_MARK = "\U000f0000"
_OFTEN = 100
"""Times that a text appears from which it is said to dominate, whatever its share."""
_SHARE, _AT_LEAST = 0.01, 10
"""The same by share of the training rows."""


def judge_template(ledger: Ledger, template: ChatTemplate) -> None:
    """Adds the findings about template and tokenizer."""
    tally = ledger.merged()
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
    if template.kind == "jinja":
        _jinja(ledger, template, tally, where)
    if end_missing(template):
        ledger.findings.append(
            Finding(
                "no_end_token",
                "warning",
                "tokenizer",
                "the tokenizer has no end token, so no answer ends: the model will not stop",
                "set eos_token in its tokenizer_config.json",
            )
        )
    tokenizer = template.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        ledger.findings.append(
            Finding(
                "pad_is_eos",
                "info",
                "tokenizer",
                f"pad and end token are the same ({tokenizer.eos_token!r}); padding is masked by "
                "its position, so the end token of each answer is trained",
            )
        )
    _own_tokens(ledger, template, tally)


def _jinja(ledger: Ledger, template: ChatTemplate, tally: Tally, where: str) -> None:
    if not template.traits.has_generation_prompt:
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
    if tally.counts.get("chats") and not template.has_generation_markers:
        ledger.findings.append(
            Finding(
                "no_generation_markers",
                "info",
                where,
                "the template has no {% generation %} markers; the answers were found by rendering "
                "each conversation again with marks inside its texts",
            )
        )
    without = tally.counts.get("without_system", 0)
    inserted = default_system_prompt(template) if without else None
    if inserted:
        shown = inserted if len(inserted) <= 80 else inserted[:80] + " ..."
        ledger.findings.append(
            Finding(
                "default_system_prompt",
                "info",
                where,
                f"the template adds a system prompt of its own to {without:,} rows: {shown!r}",
                "give the rows a system turn if another one is meant; generation gets the same",
            )
        )


def default_system_prompt(template: ChatTemplate) -> str | None:
    """Returns the system prompt that a template writes where a conversation has none."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        plain = template.text(turns, None, False)
        marked = template.text([{"role": "system", "content": _MARK}, *turns], None, False)
    except RowError:
        return None
    before, mark, after = marked.partition(_MARK)
    own = len(plain) - len(before) - len(after)
    if not mark or own <= 0 or not (plain.startswith(before) and plain.endswith(after)):
        return None
    return plain[len(before) : len(before) + own]


def _own_tokens(ledger: Ledger, template: ChatTemplate, tally: Tally) -> None:
    """Names added tokens of the data that neither template, markers nor the tokenizer's roles use.

    Such tokens are most likely the user's own, with embedding rows that nobody has trained; LoRA
    on the linear layers leaves those rows as they are.
    """
    tokenizer = template.tokenizer
    markers = template.markers.values() if template.kind == "baichuan2" else ()
    named = {str(value) for value in tokenizer.special_tokens_map.values()}
    used = [
        (token, index)
        for token, index in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
        if index in tally.added
        and index not in markers
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


@dataclass
class Repeats:
    """Texts that stand in several rows, found part by part.

    Args:
        drop: Whether only the first trained row of a text is kept, and the first held-out one.
        overlap: Whether held-out rows whose text is trained are noted.
        doubles: Trained rows whose text an earlier one has.
    """

    drop: bool
    overlap: bool
    doubles: int = 0
    _texts: int = 0
    _firsts: list[int] = field(default_factory=list)
    _most: tuple[int, int] = (0, 0)  # how often the most frequent text stands, first row negated
    _both: int = 0
    _both_first: list[int] = field(default_factory=list)

    def look(self, part: Part, sides: Sides) -> None:
        """Looks at all rows of some texts; with `drop` it marks those that are left out."""
        trained, held = part.of(sides, TRAINED), part.of(sides, HELD_OUT)
        first = np.flatnonzero(trained.firsts())
        counts = np.diff(np.append(first, len(trained.rows)))
        many = counts > 1
        if many.any():
            self.doubles += len(trained.rows) - len(first)
            self._texts += int(many.sum())
            rows, counts = trained.rows[first[many]], counts[many]
            self._firsts = _lowest(self._firsts, rows)
            often = rows[counts == counts.max()]
            self._most = max(self._most, (int(counts.max()), -int(often.min())))
        if self.drop:
            for side in (trained, held):
                sides[side.rows[~side.firsts()]] = LEFT_OUT
            held = part.of(sides, HELD_OUT)
        if self.overlap:
            both = held.rows[np.isin(held.keys, trained.keys)]
            self._both += len(both)
            self._both_first = _lowest(self._both_first, both)

    def judge(self, ledger: Ledger, store: Store, trained: int) -> None:
        """Adds the findings.

        Args:
            ledger: The books.
            store: Where the rows come from, for their places.
            trained: Number of trained rows, with those that repeat another.
        """
        if self.doubles:
            note = Note(
                "duplicates",
                "info" if self.drop else "warning",
                f"{self.doubles:,} row{'s repeat' if self.doubles > 1 else ' repeats'} the text of "
                "an earlier row ({count} texts appear more than once); "
                f"{'they are' if self.doubles > 1 else 'it is'} "
                f"{'left out' if self.drop else 'kept'}",
                "" if self.drop else "data.duplicates: drop keeps the first of each text",
                self._texts,
                [store.origin(row) for row in self._firsts],
            )
            ledger.findings.append(note.finding())
        top = self._most[0]
        if not self.drop and (top >= _OFTEN or (top >= _AT_LEAST and top >= _SHARE * trained)):
            ledger.findings.append(
                Finding(
                    "dominant_row",
                    "warning",
                    store.origin(-self._most[1]),
                    f"the text of this row appears {top:,} times ({top / trained:.1%} of the "
                    "training rows)",
                    "data.duplicates: drop keeps it once",
                )
            )
        if self._both:
            note = Note(
                "validation_overlap",
                "warning",
                "{count} validation rows have the text of a training row, so the held-out loss is "
                "too good",
                "take them out of one side",
                self._both,
                [store.origin(row) for row in self._both_first],
            )
            ledger.findings.append(note.finding())


def _lowest(known: list[int], rows: IntArray) -> list[int]:
    """Returns the first `PLACES` of known rows and others."""
    return sorted({*known, *np.sort(rows)[:PLACES].tolist()})[:PLACES]
