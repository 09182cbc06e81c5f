"""The web page of a data check: `glasstune data --html`. Counts first, then rows by token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from glasstune.core.mask import MARKS
from glasstune.reports.histogram import histogram
from glasstune.reports.web.page import render_page

Json = Mapping[str, Any]

SHOWN_TOKENS = 400_000
"""Positions on one page; more would only make the browser slow."""

LETTERS = {"trained": "t", "context": "c", "special": "s", "padding": "p"}
"""How the page's data writes a state."""

ABOUT = {
    "trained": "the loss judges how it is predicted",
    "context": "read, not trained",
    "special": "a control token that is not trained",
    "padding": "fills the row, nothing reads it",
}


def mask_page(record: Any, rows: Sequence[Any] = ()) -> str:
    """Renders a data record and some rows as one HTML file.

    Args:
        record: A `DataRecord`, or its JSON object.
        rows: `ShownRow`s, or their JSON objects.

    Returns:
        The text of the file; it loads nothing else.
    """
    json: Json = record if isinstance(record, Mapping) else record.to_dict()
    given = [row if isinstance(row, Mapping) else row.to_dict() for row in rows]
    shown = _that_fit(given)
    sources: Mapping[str, Json] = json["by_source"]
    context = {
        "record": json,
        "totals": _totals(json),
        "facts_list": _facts(json),
        "dropped": [(why, count) for why, count in json["dropped"].items() if count],
        "chart": histogram(json.get("histogram") or [], json["lengths"]),
        "bins": json.get("histogram") or [],
        "sources": [_source(name, values) for name, values in sources.items()],
        "scripts": sorted((json.get("scripts") or {}).items(), key=lambda item: -item[1]),
        "rows": [_row(row) for row in shown],
        "left_out": len(given) - len(shown),
        "states": [(state, MARKS[state], ABOUT[state]) for state in MARKS],
        "trained_as_other": any(token["instead"] is not None for token in _tokens(shown)),
    }
    return render_page(
        "mask.html.j2",
        kind="data",
        title=_title(list(sources)),
        findings=json["findings"],
        data={"marks": MARKS, "rows": [_data(row) for row in shown]},
        styles=("mask.css",),
        scripts=("mask.js",),
        context=context,
    )


def _title(names: Sequence[str]) -> str:
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2} more sources"
    return ", ".join(names) or "Data"


def _that_fit(rows: Iterable[Json]) -> list[Json]:
    """Returns rows up to `SHOWN_TOKENS` positions, one at least."""
    found: list[Json] = []
    room = SHOWN_TOKENS
    for row in rows:
        room -= len(row["tokens"])
        if found and room < 0:
            break
        found.append(row)
    return found


def _tokens(rows: Iterable[Json]) -> Iterable[Json]:
    return (token for row in rows for token in row["tokens"])


def _totals(record: Json) -> list[tuple[str, str, str]]:
    """The numbers on top: (number, what it counts, a remark)."""
    tokens, trained = record["tokens"], record["trained_tokens"]
    dropped = sum(record["dropped"].values())
    held = record.get("held_out") or 0
    return [
        (f"{record['rows']:,}", "rows read", ""),
        (f"{record['kept']:,}", "kept", f"{held:,} of them held out" if held else ""),
        (f"{dropped:,}", "dropped", "" if dropped else "every row is kept"),
        (f"{tokens:,}", "tokens", ""),
        (f"{trained:,}", "trained tokens", f"{trained / tokens:.1%} of all" if tokens else ""),
    ]


def _facts(record: Json) -> list[tuple[str, str]]:
    found = [(name, f"{value:,} tokens") for name, value in record["lengths"].items()]
    names = {"p50": "half of the rows up to", "p95": "95 of 100 up to", "max": "longest"}
    found = [(names.get(name, name), value) for name, value in found]
    found.append(("answers cut", f"{record.get('cut') or 0:,}"))
    found.append(("rows that repeat another", f"{record.get('duplicates') or 0:,}"))
    found += [(name, str(value)) for name, value in (record.get("policies") or {}).items()]
    if record.get("fingerprint"):
        found.append(("fingerprint", str(record["fingerprint"])[:16]))
    return found


def _source(name: str, values: Json) -> dict[str, Any]:
    tokens = values.get("tokens", 0)
    return {
        "name": name,
        **values,
        "share": values.get("trained_tokens", 0) / tokens if tokens else None,
    }


def _row(row: Json) -> dict[str, Any]:
    """What the page's text says of a row: its counts and a strip of its states."""
    tokens = row["tokens"]
    length = len(tokens)
    strip = []
    at = 0
    for state, run in groupby(tokens, key=lambda token: str(token["state"])):
        count = sum(1 for _ in run)
        strip.append((state, at / length, count / length))
        at += count
    padding = sum(token["state"] == "padding" for token in tokens)
    trained = sum(token["state"] == "trained" for token in tokens)
    real = length - padding
    edges = [
        (index + 1, document["start"] / length, (document["end"] - document["start"]) / length)
        for index, document in enumerate(row["documents"])
    ]
    return {
        "row": row["row"],
        "documents": len(row["documents"]),
        "tokens": real,
        "trained": trained,
        "share": trained / real if real else 0.0,
        "padding": padding,
        "strip": strip,
        "edges": edges,
    }


def _data(row: Json) -> dict[str, Any]:
    """A row for the script: columns instead of an object a token."""
    tokens = row["tokens"]
    return {
        "row": row["row"],
        # Records of before have no turns.
        "documents": [{"turns": [], **document} for document in row["documents"]],
        "texts": [token["text"] for token in tokens],
        "ids": [token["id"] for token in tokens],
        "states": "".join(LETTERS[token["state"]] for token in tokens),
        "special": [at for at, token in enumerate(tokens) if token["special"]],
        "instead": {
            str(at): token["instead"]
            for at, token in enumerate(tokens)
            if token["instead"] is not None
        },
    }
