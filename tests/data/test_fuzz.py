"""Any bytes and any rows: no traceback, and every row is kept or counted."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import chat_tokenizer
from fuzz import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preparing import BASE, CHATML, prepare

from glasstune.core.errors import GlasstuneError, InputError
from glasstune.data import chunks, read_array
from glasstune.data.mask import show_rows
from glasstune.data.read import BadRow, RawRow, ReadStats, read_rows
from glasstune.data.write import write_rows

QUICK = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
texts = st.text(max_size=12) | st.sampled_from(
    ["", "why?", "<|im_end|>", "</s>", "\u4e8c", "\ud800", "\x00", "None", "{% x %}", "a" * 300]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
roles = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "x"]
)
turns = st.fixed_dictionaries(
    {"role": roles | anything, "content": texts | anything},
    optional={"tool_calls": anything, "name": anything},
) | st.fixed_dictionaries({"from": roles, "value": texts})
ROWS = {
    "alpaca": st.fixed_dictionaries(
        {"instruction": texts | anything, "output": texts | anything},
        optional={"input": anything, "system": anything, "history": anything},
    ),
    "messages": st.fixed_dictionaries(
        {"messages": st.lists(turns | anything, max_size=5) | anything},
        optional={"tools": anything, "system": anything},
    ),
    "conversations": st.fixed_dictionaries({"conversations": st.lists(turns, max_size=5)}),
    "prompt_completion": st.fixed_dictionaries(
        {"prompt": texts | anything, "completion": texts | anything}
    ),
    "text": st.fixed_dictionaries({"text": texts | anything}),
}


def balanced(data: Any, rows: int) -> None:
    record = data.record
    assert record.rows == rows == record.kept + sum(record.dropped.values())
    held = len(data.validation.documents) if data.validation else 0
    assert len(data.train.documents) + held == record.kept
    assert all(document.trained_tokens for document in data.train.documents)
    assert all(len(document) <= data.config.max_length for document in data.train.documents)
    json.dumps(record.to_dict(), allow_nan=False)
    for row in show_rows(data, 2):
        for document in row.documents:
            edges = [turn.start for turn in document.turns] + [document.end]
            assert [turn.end for turn in document.turns] == edges[1:]
            assert edges[0] == (document.start if document.turns else document.end)
            assert edges == sorted(set(edges))


@pytest.mark.parametrize("form", list(ROWS))
@settings(max_examples=examples(40), **QUICK)  # type: ignore[arg-type]
@given(data=st.data())
def test_fuzz_no_row_is_lost_without_a_count(form: str, data: Any) -> None:
    rows = data.draw(st.lists(ROWS[form] | anything, min_size=1, max_size=8))
    options = data.draw(
        st.fixed_dictionaries(
            {
                "on_error": st.sampled_from(["stop", "skip"]),
                "truncation": st.sampled_from(["drop", "cut"]),
                "duplicates": st.sampled_from(["keep", "drop"]),
                "max_length": st.sampled_from([8, 24, 400]),
                "validation_split": st.sampled_from([0.0, 0.3]),
                "train_on": st.sampled_from(["assistant", "last_assistant", "all"]),
                "packing": st.booleans(),
            }
        )
    )
    tokenizer = data.draw(st.sampled_from([CHATML, chat_tokenizer("qwen3"), BASE]))
    if tokenizer is BASE:
        options["chat_template"] = "plain"
    source = [{"path": rows, "format": form}]
    with contextlib.suppress(InputError):  # such as no row that can be read
        balanced(prepare(source, tokenizer, stop=False, **options), len(rows))


json_like = st.text(alphabet='[]{}",:\n\\ua1 -.é;\t', max_size=80).map(str.encode)
lines = st.lists(
    st.sampled_from(
        [b'{"text": "a"}', b'{"text": null}', b"{}", b"[1]", b"", b"  ", b"NOT JSON", b"\xff\xfe",
         b'{"text": "\xe9"}', b'{"text": "a"', b'{"text": ["a"]}', b'{"text": "a"}\r', b"1e999",
         b'{"text": 1e999}', b'{"a":' * 2000]
    ),
    max_size=9,
).map(b"\n".join)  # fmt: skip


@settings(max_examples=examples(150), **QUICK)  # type: ignore[arg-type]
@given(
    raw=st.binary(max_size=60)
    | json_like
    | lines
    | lines.map(lambda part: b'{"text": "a"}\n' + part),
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet"]),
    skip=st.booleans(),
)
def test_fuzz_any_file_gives_a_balance_or_one_clear_error(
    tmp_path: Path, raw: bytes, suffix: str, skip: bool
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(raw)
    expected: int | None = None
    with contextlib.suppress(InputError):
        expected = sum(1 for _ in read_rows(path))
    caught: GlasstuneError | None = None
    try:
        data = prepare(path, BASE, stop=False, on_error="skip" if skip else "stop")
    except InputError as error:
        caught = error
    if caught is None:
        assert expected is not None
        balanced(data, expected)
    else:
        assert caught.message
        assert caught.fix
        assert str(tmp_path) in caught.where


@settings(max_examples=examples(150), **QUICK)  # type: ignore[arg-type]
@given(
    rows=st.lists(anything, max_size=6),
    block=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    garbage=st.sampled_from(["", " \n", ",", "]", "x"]),
)
def test_fuzz_an_array_reads_the_same_in_blocks_of_any_size(
    tmp_path: Path, rows: list[Any], block: int, indent: int | None, garbage: str
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=False) + garbage
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    usual, read_array.BLOCK = read_array.BLOCK, block
    caught: InputError | None = None
    try:
        found = list(read_rows(path))
    except InputError as error:
        caught = error
    finally:
        read_array.BLOCK = usual
    if caught is not None:
        assert garbage.strip() or b"\xed" in path.read_bytes()
        assert str(path) in caught.where
        return
    assert not garbage.strip()
    assert len(found) == len(rows)
    for row, value in zip(found, rows, strict=True):
        if isinstance(value, dict):
            assert isinstance(row, RawRow)
            assert json.dumps(row.value) == json.dumps(value)
        else:
            assert isinstance(row, BadRow)
        place = row.origin.removeprefix(str(path)).lstrip(":").partition("[")[0]
        assert 1 <= int(place) <= text.count("\n") + 1


@settings(max_examples=examples(60), **QUICK)  # type: ignore[arg-type]
@given(
    rows=st.lists(
        st.fixed_dictionaries({"text": st.text(max_size=9), "n": st.text(max_size=3)}),
        min_size=1,
        max_size=12,
    ),
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]),
    size=st.integers(1, 5),
    limit=st.integers(1, 200),
)
def test_fuzz_pieces_of_any_size_hold_every_row_once(
    tmp_path: Path, rows: list[dict[str, str]], suffix: str, size: int, limit: int
) -> None:
    from glasstune.core.config import SourceConfig
    from glasstune.data.choose import open_source

    with contextlib.suppress(UnicodeEncodeError):
        path = write_rows(rows, tmp_path / f"x{suffix}")
        kept = chunks.ROWS, chunks.BYTES
        chunks.ROWS, chunks.BYTES = size, limit
        try:
            source = open_source(SourceConfig(path=str(path)), "x", Path("."))
            pieces = list(chunks.chunks(source))
        except InputError:  # CSV has no way to write some control characters
            return
        finally:
            chunks.ROWS, chunks.BYTES = kept
        assert [piece.number for piece in pieces] == list(range(len(pieces)))
        stats = ReadStats()
        read = [row for piece in pieces for row in piece.read(stats)]
        assert read == list(read_rows(path))
        assert sum(piece.size for piece in pieces) <= path.stat().st_size
