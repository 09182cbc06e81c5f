"""What the data check says about the data as a whole: template, tokenizer, repeated texts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glasstune.core.batch import IntArray
from glasstune.core.findings import Finding
from glasstune.data.checks import end_missing
from glasstune.data.documents import Store
from glasstune.data.errors import RowError
from glasstune.data.ledger import Ledger
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
    """Names added tokens of the data that neither the template nor the tokenizer's roles use.

    Such tokens are most likely the user's own, with embedding rows that nobody has trained; LoRA
    on the linear layers leaves those rows as they are.
    """
    tokenizer = template.tokenizer
    named = {str(value) for value in tokenizer.special_tokens_map.values()}
    used = [
        (token, index)
        for token, index in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
        if index in tally.added
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


def judge_repeats(
    ledger: Ledger, store: Store, keys: NDArray[np.uint64], rows: IntArray, *, drop: bool
) -> int:
    """Notes texts that stand in several training rows.

    Args:
        ledger: The books.
        store: Where the rows come from, for their places.
        keys: Text keys of all rows of the store.
        rows: The training rows.
        drop: Whether the later ones are left out.

    Returns:
        Rows whose text an earlier row has.
    """
    ordered = np.sort(keys[rows])
    doubles = int((ordered[1:] == ordered[:-1]).sum())
    del ordered
    if doubles == 0:
        return 0
    _, first, counts = np.unique(keys[rows], return_index=True, return_counts=True)
    many = np.flatnonzero(counts > 1)
    order = many[np.argsort(first[many], kind="stable")][:PLACES]
    places = [store.origin(int(rows[first[k]])) for k in order]
    note = Note(
        "duplicates",
        "info" if drop else "warning",
        f"{{count}} rows repeat the text of an earlier row ({len(many):,} texts appear more than "
        f"once); they are {'left out' if drop else 'kept'}",
        "" if drop else "data.duplicates: drop keeps the first of each text",
        doubles,
        places,
    )
    ledger.findings.append(note.finding())
    top = int(counts.max())
    if not drop and (top >= _OFTEN or (top >= _AT_LEAST and top >= _SHARE * len(rows))):
        at = store.origin(int(rows[first[int(counts.argmax())]]))
        ledger.findings.append(
            Finding(
                "dominant_row",
                "warning",
                at,
                f"the text of this row appears {top:,} times ({top / len(rows):.1%} of the "
                "training rows)",
                "data.duplicates: drop keeps it once",
            )
        )
    return doubles


def judge_overlap(
    ledger: Ledger, store: Store, keys: NDArray[np.uint64], training: IntArray,
    validation: IntArray,
) -> None:  # fmt: skip
    """Notes validation rows whose text is also trained."""
    both = validation[np.isin(keys[validation], keys[training])]
    if len(both):
        note = Note(
            "validation_overlap",
            "warning",
            "{count} validation rows have the text of a training row, so the held-out loss is too "
            "good",
            "take them out of one side",
            len(both),
            [store.origin(int(row)) for row in both[:PLACES]],
        )
        ledger.findings.append(note.finding())
