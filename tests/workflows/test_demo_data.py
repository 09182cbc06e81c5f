"""The data set from Python's documentation: stable, clean, in every format."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glasstune.core.errors import InputError
from glasstune.workflows.demo_data import demo_pairs, write_demo_data

DIGEST = (
    "import hashlib, sys; from glasstune.workflows.demo_data import demo_pairs;"
    "print(hashlib.sha256(repr(demo_pairs()).encode()).hexdigest(), 'torch' in sys.modules)"
)


def test_there_are_some_thousand_pairs_and_none_twice() -> None:
    pairs = demo_pairs()
    assert 3000 < len(pairs) < 10_000
    assert len({pair.question for pair in pairs}) == len(pairs)
    assert len({pair.answer for pair in pairs}) == len(pairs)
    assert all(20 <= len(pair.answer) <= 700 for pair in pairs)


def test_known_answers() -> None:
    by_question = {pair.question: pair.answer for pair in demo_pairs()}
    assert by_question["What does Python's `math.gcd` do?"] == "Greatest Common Divisor."
    assert by_question["How is Python's `bisect.insort_left` called?"] == (
        "Its signature is `insort_left(a, x, lo=0, hi=None, *, key=None)`."
    )
    assert by_question["What does Python's `len` do?"].startswith("Return the number of items")


def test_nothing_depends_on_the_process() -> None:
    for pair in demo_pairs():
        assert not re.search(r"0x[0-9a-f]{6,}| object at ", pair.answer), pair
        assert str(Path.home()) not in pair.answer


def test_same_rows_for_another_hash_seed_and_no_torch() -> None:
    seen = {
        subprocess.run(
            [sys.executable, "-W", "error", "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert seen.pop().split()[1] == "False"


def test_each_format_holds_the_same_pairs(tmp_path: Path) -> None:
    pairs = [(pair.question, pair.answer) for pair in demo_pairs()]

    alpaca = json.loads(write_demo_data(tmp_path, "alpaca").read_text())
    assert [(row["input"] or row["instruction"], row["output"]) for row in alpaca] == pairs

    turns = []
    for row in json.loads(write_demo_data(tmp_path, "conversations").read_text()):
        values = row["conversations"]
        assert [turn["from"] for turn in values] == ["human", "gpt"] * (len(values) // 2)
        turns += [turn["value"] for turn in values]
    assert list(zip(turns[::2], turns[1::2], strict=True)) == pairs

    turns = []
    for line in write_demo_data(tmp_path, "messages").read_text().splitlines():
        messages = json.loads(line)["messages"]
        turns += [m["content"] for m in messages if m["role"] != "system"]
    assert list(zip(turns[::2], turns[1::2], strict=True)) == pairs

    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        with write_demo_data(tmp_path, name).open(newline="") as file:  # type: ignore[arg-type]
            rows = list(csv.DictReader(file, delimiter=delimiter))
        assert [(row["prompt"], row["completion"]) for row in rows] == pairs

    import pyarrow.parquet

    table = pyarrow.parquet.read_table(write_demo_data(tmp_path, "parquet")).to_pylist()
    assert [(row["prompt"], row["completion"]) for row in table] == pairs

    text = write_demo_data(tmp_path, "text", rows=2).read_text().splitlines()
    assert [json.loads(line)["text"] for line in text] == ["\n".join(pair) for pair in pairs[:2]]


def test_rows_and_skip_share_nothing(tmp_path: Path) -> None:
    first = json.loads(write_demo_data(tmp_path / "a", "alpaca", rows=40).read_text())
    second = json.loads(write_demo_data(tmp_path / "b", "alpaca", rows=40, skip=40).read_text())
    assert len(first) == len(second) == 40
    assert not {row["output"] for row in first} & {row["output"] for row in second}


def test_too_many_rows_and_unknown_format_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1000000 rows asked for") as caught:
        write_demo_data(tmp_path, "alpaca", rows=1_000_000)
    assert "at most" in caught.value.fix
    with pytest.raises(InputError, match="xml"):
        write_demo_data(tmp_path, "xml")  # type: ignore[arg-type]
