"""Whose turn each token of a shown row belongs to.

Stored rows know no roles: they are ids and labels. For the few rows that are shown, the row is
read again from where it came from, rendered with marks in its texts (as `spans` does), and the
places of the texts are looked up among the tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from glasstune.core.batch import IGNORED, Document
from glasstune.core.errors import InputError
from glasstune.core.mask import ShownTurn
from glasstune.data.choose import OpenSource
from glasstune.data.errors import RowError
from glasstune.data.formats import Example, to_example
from glasstune.data.judge import default_system_prompt
from glasstune.data.read import RawRow, ReadStats, is_line_file, read_lines, read_rows
from glasstune.data.spans import text_places
from glasstune.data.template import ChatTemplate
from glasstune.data.work import input_join

UNKNOWN = "unknown"
TEMPLATES_SYSTEM = "system (the template's own)"


def raw_rows(source: OpenSource, origins: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Reads some rows of a source again.

    Args:
        source: The source.
        origins: Where they came from.

    Returns:
        Rows by origin; without those that are not there any more.
    """
    wanted = set(origins)
    if source.config.rows is not None:
        rows = source.config.rows
        return {at: rows[number] for at in wanted if (number := _number(at)) < len(rows)}
    if source.table is not None:
        return {at: dict(source.table[_number(at)]) for at in wanted}
    found: dict[str, Mapping[str, Any]] = {}
    for path in source.files or ():
        own = {at for at in wanted if at.startswith((f"{path}:", f"{path}["))}
        reading = _lines(str(path), own) if is_line_file(path) else read_rows(path)
        for row in reading if own else ():
            if row.origin in own and isinstance(row, RawRow):
                found[row.origin] = row.value
            if own <= found.keys():
                break
    return found


def _number(origin: str) -> int:
    return int(origin.rpartition("[")[2].rstrip("]"))


def _lines(path: str, origins: set[str]) -> Iterable[Any]:
    """Reads lines by their numbers without parsing those before them."""
    numbers = {int(at.removeprefix(f"{path}:")) for at in origins}
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if number in numbers:
                raw = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                yield from read_lines(Path(path), [raw], number, ReadStats())
            if number >= max(numbers, default=0):
                return


def examples_of(
    sources: Sequence[OpenSource], template: ChatTemplate, documents: Iterable[Document]
) -> dict[tuple[int, str], Example]:
    """Returns the examples of some documents, by source and origin, where they can be read."""
    wanted: dict[int, set[str]] = {}
    for document in documents:
        wanted.setdefault(document.source, set()).add(document.origin)
    found: dict[tuple[int, str], Example] = {}
    for index, origins in wanted.items():
        source = sources[index]
        try:
            rows = raw_rows(source, origins)
        except (InputError, OSError, ValueError):  # changed since: its turns are unknown
            continue
        for origin, row in rows.items():
            try:
                found[index, origin] = to_example(
                    row, origin, source.format, source.config.columns, join=input_join(template)
                )
            except RowError:
                continue
    return found


def turns_of(
    template: ChatTemplate,
    example: Example | None,
    document: Document,
    texts: Sequence[str],
    special: set[int],
) -> list[ShownTurn]:
    """Returns the turns of a document, places counted from its start.

    Args:
        template: The chat template.
        example: The row; None where it cannot be read again.
        document: Its tokens.
        texts: Their texts, which join to the document's.
        special: Ids of control tokens.
    """
    size = len(document)
    if example is not None and example.kind == "text":
        return []
    if template.kind == "baichuan2":
        return _marked_turns(template.markers, document)
    if example is None:
        return [ShownTurn(UNKNOWN, 0, size)]
    if template.kind == "none":
        return _pair(document)
    try:
        rendered, places = text_places(template.text, example.messages, example.tools)
    except RowError:
        return [ShownTurn(UNKNOWN, 0, size)]
    found = [(str(m["role"]), at) for m, at in zip(example.messages, places, strict=True)]
    if found[0][0] != "system" and (own := default_system_prompt(template)) is not None:
        at = rendered.find(own)
        found.insert(0, (TEMPLATES_SYSTEM, (at, at + len(own)) if at >= 0 else None))
    # Blanks are not counted: tokenizers that put one before a text take it away or leave it.
    ends = list(accumulate(len(_solid(text)) for text in texts))
    whole = _solid("".join(texts))
    stops = set(template.stop_ids)
    starts: list[tuple[str, int]] = []
    behind = 0  # the token behind the text of the turn before
    for role, place in found:
        if place is None:
            continue
        before, text = _solid(rendered[: place[0]]), _solid(rendered[place[0] : place[1]])
        first = bisect_right(ends, len(before))
        if not whole.startswith(before) or first >= size:  # changed by the tokenizer, or cut off
            break
        starts.append((role, _opening(document, texts, behind, first, special)))
        behind = min(bisect_right(ends, len(before) + len(text) - 1) + 1, size)
        if not text:  # a call, whose arguments follow: up to its end token
            closing = (k for k in range(behind, size) if int(document.ids[k]) in stops)
            behind = next(closing, behind)
    if not starts:
        return [ShownTurn(UNKNOWN, 0, size)]
    starts[0] = (starts[0][0], 0)
    edges = [start for _, start in starts] + [size]
    return [
        ShownTurn(role, start, end)
        for (role, _), (start, end) in zip(starts, pairwise(edges), strict=True)
        if start < end
    ]


def _solid(text: str) -> str:
    return "".join(text.split())


def _opening(
    document: Document, texts: Sequence[str], behind: int, first: int, special: set[int]
) -> int:
    """Returns where a turn begins between the text of the one before and its own.

    A control token right behind a text closes it, with the blanks that follow; the rest opens
    the next turn.
    """
    at = behind
    if 0 < at < first and int(document.ids[at]) in special:
        at += 1
        while at < first and texts[at] and not texts[at].strip():
            at += 1
    return at


def _marked_turns(markers: Mapping[str, int], document: Document) -> list[ShownTurn]:
    """Returns the turns of Baichuan2's rule, which opens each with a marker token."""
    roles = {index: role for role, index in markers.items()}
    starts = [(k, roles[int(token)]) for k, token in enumerate(document.ids) if token in roles]
    if not starts or starts[0][0] > 0:
        starts.insert(0, (0, "system"))
    edges = [start for start, _ in starts] + [len(document)]
    return [
        ShownTurn(role, start, end)
        for (_, role), (start, end) in zip(starts, pairwise(edges), strict=True)
    ]


def _pair(document: Document) -> list[ShownTurn]:
    """Returns prompt and completion, which were tokenised apart."""
    trained = [k for k, label in enumerate(document.labels.tolist()) if label != IGNORED]
    border = trained[0] if trained else len(document)
    found = [ShownTurn("prompt", 0, border), ShownTurn("completion", border, len(document))]
    return [turn for turn in found if turn.start < turn.end]
