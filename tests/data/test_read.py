import codecs
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from fuzz import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasstune.core.errors import InputError
from glasstune.data.read import BadRow, RawRow, ReadStats, read_rows
from glasstune.data.write import write_rows

ROWS = [{"instruction": "q", "output": "a"}, {"instruction": "ü\u2028x", "output": "二"}]


def values(path: Path) -> list[dict[str, Any]]:
    rows = list(read_rows(path))
    assert all(isinstance(row, RawRow) for row in rows), rows
    return [row.value for row in rows if isinstance(row, RawRow)]


@pytest.mark.parametrize(
    "text", ['{"instruction":"q","output":"a"}\n', '[{"instruction":"q","output":"a"}]']
)
def test_d01_bom_reads_the_same_rows(tmp_path: Path, text: str) -> None:
    plain, marked = tmp_path / "plain.json", tmp_path / "bom.json"
    plain.write_text(text, encoding="utf-8")
    marked.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert values(marked) == values(plain) == ROWS[:1]


def test_d01_bom_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(codecs.BOM_UTF8 + b"instruction,output\nq,a\n")
    assert values(path) == ROWS[:1]


def test_d03_blank_lines_counted_and_bad_line_named_by_its_physical_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row = json.dumps(ROWS[0])
    path.write_text(f"{row}\n  \r\n{row}\nNOT JSON\n{row}\n")
    stats = ReadStats()
    rows = list(read_rows(path, stats))
    assert stats.blank_lines == {str(path): 1}
    assert [type(row) for row in rows] == [RawRow, RawRow, BadRow, RawRow]
    bad = rows[2]
    assert isinstance(bad, BadRow)
    assert bad.origin == f"{path}:4"
    assert "NOT JSON" in bad.message
    assert "char" not in bad.message  # no parser internals
    assert rows[3].origin == f"{path}:5"


def test_d03_broken_array_names_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[\n{"a": 1},\n\n{"a": oops}\n]')
    with pytest.raises(InputError) as error:
        list(read_rows(path))
    assert error.value.where == f"{path}:4"
    assert "oops" in error.value.message


def test_array_rows_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"a": 1}, {"a": [2, 3]}, {"a": "x\ny"}], indent=2))
    lines = path.read_text().splitlines()
    for row in read_rows(path):
        line = int(row.origin.rsplit(":", 1)[1])
        assert lines[line - 1].strip() == "{"
    assert [row.origin.rsplit(":", 1)[1] for row in read_rows(path)] == ["2", "5", "11"]


def test_rows_of_one_line_have_origins_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, {"a": 2},\n{"a": 3}, 4]')
    ends = [row.origin.removeprefix(str(path)) for row in read_rows(path)]
    assert ends == [":1", ":1[1]", ":2", ":2[3]"]


def test_d06_kind_follows_content_not_name(tmp_path: Path) -> None:
    lines, array = tmp_path / "x.json", tmp_path / "x.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in ROWS))
    array.write_text("\n  " + json.dumps(ROWS))
    assert values(lines) == values(array) == ROWS


def test_d08_one_very_long_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "x" * 30_000_000}) + "\n" + json.dumps({"text": "y"}))
    rows = values(path)
    assert [len(row["text"]) for row in rows] == [30_000_000, 1]


def test_line_separators_inside_strings_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8"
    )
    assert values(path) == ROWS


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"a": 'x, y\t"z"', "b": "line\nbreak"}, {"a": "", "b": "None"}]
    assert values(write_rows(rows, tmp_path / f"x{suffix}")) == rows


def test_parquet_is_known_by_content_and_keeps_nulls(tmp_path: Path) -> None:
    path = write_rows([{"a": "x", "b": None}, {"a": "y", "b": "z"}], tmp_path / "x.parquet")
    renamed = path.rename(tmp_path / "x.json")
    assert values(renamed) == [{"a": "x", "b": None}, {"a": "y", "b": "z"}]


@pytest.mark.parametrize(
    ("name", "raw", "code", "line"),
    [
        ("x.jsonl", b"", "empty_file", ""),
        ("x.jsonl", b" \n\n", "empty_file", ""),
        ("x.txt", b"just text", "unknown_file_kind", ""),
        ("x.json", "[{}]".encode("utf-16"), "not_utf8", ""),
        ("x.jsonl", b'{"a": "ok"}\n{"a": "\xe9"}\n', "not_utf8", ":2"),
        ("x.json", b'[{"a": 1},\n{"a": "\xe9"}]', "not_utf8", ":2"),
        ("x.json", b'{\n "a": 1\n}', "bad_json", ":1"),
        ("x.json", b'[{"a": 1}\n', "bad_json", ":2"),
        ("x.json", b'[{"a": 1}] {"b": 2}', "bad_json", ":1"),
        ("x.csv", b'a,b\n"open,1\n', "bad_csv", ":2"),
        ("x.csv", b"a,a\n1,2\n", "bad_csv", ":1"),
        ("x.parquet", b"PAR1 and nothing else", "bad_parquet", ""),
    ],
)
def test_broken_files_are_named(
    tmp_path: Path, name: str, raw: bytes, code: str, line: str
) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(InputError) as error:
        list(read_rows(path))
    assert error.value.code == code
    assert error.value.where == f"{path}{line}"
    assert error.value.fix


def test_csv_row_of_wrong_width_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('a,b\n1,"2\n2"\n\n3\n4,5\n')
    rows = list(read_rows(path))
    assert [row.origin.rsplit(":", 1)[1] for row in rows] == ["2", "5", "6"]
    assert isinstance(rows[1], BadRow)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path, code in ((tmp_path / "no.jsonl", "unreadable_file"), (tmp_path, "data_is_folder")):
        with pytest.raises(InputError) as error:
            list(read_rows(path))
        assert error.value.code == code


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=5),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_fuzz_json_round_trip(
    tmp_path: Path, rows: list[dict[str, Any]], ascii_only: bool, indent: int | None
) -> None:
    array, lines = tmp_path / "a", tmp_path / "l"
    options: dict[str, Any] = {"ensure_ascii": ascii_only}
    array.write_bytes(json.dumps(rows, indent=indent, **options).encode("utf-8", "replace"))
    lines.write_bytes(
        b"\n".join(json.dumps(row, **options).encode("utf-8", "replace") for row in rows)
    )
    expected = json.loads(array.read_bytes())
    assert values(array) == expected
    assert values(lines) == expected


@settings(
    max_examples=examples(120),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    raw=st.binary(max_size=60)
    | st.text(alphabet='[]{}",:\n\\ua1 -.é', max_size=60).map(str.encode),
    suffix=st.sampled_from([".json", ".csv", ".tsv"]),
)
def test_fuzz_any_bytes_give_rows_or_an_input_error(
    tmp_path: Path, raw: bytes, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(raw)
    with contextlib.suppress(InputError):
        assert all(row.origin.startswith(f"{path}:") for row in read_rows(path))
