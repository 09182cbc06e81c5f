"""Data records and shown rows for tests of the page: real ones, and one made by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

from preparing import alpaca, prepare

from glasstune.core.mask import ShownDocument, ShownRow, ShownToken
from glasstune.data.mask import show_rows

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">"


@cache
def real(count: int = 12, max_length: int = 128) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A packed set of `count` questions, one bad row skipped: record and first three rows."""
    rows = [*alpaca(count), {"instruction": "no answer", "output": None}]
    prepared = prepare(rows, max_length=max_length, on_error="skip")
    return prepared.record.to_dict(), [row.to_dict() for row in show_rows(prepared, 3)]


def by_hand() -> dict[str, Any]:
    """Two documents with every state and every odd text, then padding."""
    tokens = (
        ShownToken("<s>", 1, "special", special=True),
        ShownToken("Say", 10, "context"),
        ShownToken(" it", 11, "context"),
        ShownToken("\n", 12, "context"),
        ShownToken(" Hello", 13, "trained"),
        ShownToken("", 14, "trained"),
        ShownToken("\u20ac", 15, "trained"),
        ShownToken("  ", 16, "trained"),
        ShownToken("\t", 17, "trained"),
        ShownToken("</s>", 2, "trained", special=True),
        ShownToken("<user>", 3, "trained", special=True, instead="</s>"),
        ShownToken(HOSTILE, 18, "context"),
        ShownToken("a\u202eb", 19, "trained"),
        *[ShownToken("<pad>", 0, "padding", special=True)] * 5,
    )
    documents = (
        ShownDocument("data.jsonl:7", "mine", 0, 10, 6),
        ShownDocument(HOSTILE, HOSTILE, 10, 13, 2),
    )
    return ShownRow(41, tokens, documents).to_dict()


def hand_record(**changes: Any) -> dict[str, Any]:
    """A record of numbers that occur once."""
    record: dict[str, Any] = {
        "rows": 1234,
        "kept": 1201,
        "dropped": {"too_long": 21, "empty_answer": 12, "bad_json": 0},
        "tokens": 456_789,
        "trained_tokens": 123_456,
        "lengths": {"p50": 311, "p95": 1402, "max": 2047},
        "by_source": {
            "first": {"rows": 1000, "kept": 990, "tokens": 400_000, "trained_tokens": 100_000},
            "empty": {"rows": 0, "kept": 0, "tokens": 0, "trained_tokens": 0},
        },
        "findings": [
            {"code": "a", "severity": "info", "where": "x", "message": "told", "fix": ""},
            {"code": "b", "severity": "error", "where": "f:3", "message": "bad", "fix": "mend"},
        ],
        "policies": {"truncation": "drop", "on_error": "skip", "duplicates": "keep"},
        "cut": 17,
        "duplicates": 19,
        "scripts": {"Han": 0.25, "Latin": 0.75},
        "held_out": 24,
        "fingerprint": "0123456789abcdef" * 4,
        "histogram": [[0, 999, 800], [1000, 1999, 0], [2000, 2999, 401]],
    }
    return record | changes
