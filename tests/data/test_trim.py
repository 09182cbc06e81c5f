"""The cache of tokenised rows: it stays below a size, and knows data by its bytes alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from preparing import alpaca, prepare

from glasstune.core.choices import Choice, Choices
from glasstune.core.errors import InputError
from glasstune.data import chunks, tokenise, trim
from glasstune.data.prepare import PreparedData


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and pieces of 8 rows."""
    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chunks, "ROWS", 8)
    return tmp_path / "cache" / "data"


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_choices(path: Path, **options: Any) -> tuple[PreparedData, dict[str, Choice]]:
    choices = Choices()
    data = prepare(path, choices=choices, **options)
    return data, {choice.name: choice for choice in choices}


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def age(folder: Path, seconds: int) -> None:
    os.utime(folder / "use", (1e9 - seconds, 1e9 - seconds))


def test_a_file_that_is_moved_is_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = alpaca(30)
    rows[9] = {"instruction": "no answer"}
    rows[11]["output"] = rows[12]["output"] = ""
    old = write(tmp_path / "old" / "a.jsonl", rows)
    old.write_text(old.read_text() + "\n\n")
    first = prepare(old, on_error="skip")
    monkeypatch.setattr(tokenise, "do", None)
    new = tmp_path / "new" / "b.json"
    new.parent.mkdir()
    old.rename(new)
    second, choices = with_choices(new, on_error="skip")
    assert choices["data.cache.b"].value == "read"
    assert second.fingerprint == first.fingerprint
    assert [d.origin for d in second.train.documents][:9] == [f"{new}:{k}" for k in range(1, 10)]
    told = json.dumps(first.record.to_dict()["findings"])
    assert str(old) in told
    moved = json.dumps(second.record.to_dict()["findings"])
    assert moved == told.replace(str(old), str(new))
    assert {found.code for found in second.record.findings} >= {"blank_lines", "missing_key"}


def test_files_of_a_pattern_keep_their_own_names(tmp_path: Path) -> None:
    rows = alpaca(20)
    for name, part in (("a", rows[:10]), ("b", rows[10:])):
        write(tmp_path / "one" / f"{name}.jsonl", part)
    prepare(tmp_path / "one" / "*.jsonl")
    (tmp_path / "one").rename(tmp_path / "two")
    data, choices = with_choices(tmp_path / "two" / "*.jsonl")
    assert choices[f"data.cache.{data.sources[0]}"].value == "read"
    assert [d.origin for d in data.train.documents] == [
        f"{tmp_path}/two/{name}.jsonl:{line}" for name in "ab" for line in range(1, 11)
    ]
    (tmp_path / "two" / "b.jsonl").rename(tmp_path / "two" / "0.jsonl")  # another order
    data, choices = with_choices(tmp_path / "two" / "*.jsonl")
    assert choices[f"data.cache.{data.sources[0]}"].value == "made"
    assert data.train.documents[0].origin == f"{tmp_path}/two/0.jsonl:1"


def test_what_a_name_says_of_its_content_is_part_of_the_key(tmp_path: Path) -> None:
    text = "instruction,output\ta\nwhy?,so\tb\n"
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "a.tsv").write_text(text)
    columns = {"prompt": "instruction", "completion": "output\ta"}
    prepare([{"path": str(tmp_path / "a.csv"), "columns": columns}])
    other = {"prompt": "instruction,output", "completion": "a"}
    found = prepare([{"path": str(tmp_path / "a.tsv"), "columns": other}])
    assert found.record.kept == 1
    key = {"path": str(tmp_path / "a.tsv"), "columns": columns}
    with pytest.raises(InputError):  # not the rows that the CSV file left
        prepare([key])


def test_what_was_not_used_for_longest_goes_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    for number in range(4):
        prepare(write(tmp_path / f"{number}.jsonl", alpaca(40 + number)))
        made += [path for path in entries(cache) if path not in made]
    sizes = [trim._size(path) for path in made]
    for number, seconds in enumerate((10, 40, 20, 30)):
        age(made[number], seconds)
    data, choices = with_choices(tmp_path / "1.jsonl")  # used again: now the last to go
    assert choices["data.cache.1"].value == "read"
    del data
    monkeypatch.setenv("GLASSTUNE_CACHE_LIMIT", str(sum(sizes) + 1))
    last = write(tmp_path / "5.jsonl", alpaca(40))
    last.write_text(last.read_text().replace("why", "who"))
    _, choices = with_choices(last)
    assert not made[3].exists()
    assert [path.exists() for path in made[:3]] == [True] * 3
    removed = choices["data.cache.removed"]
    assert removed.value == 1
    assert "GLASSTUNE_CACHE_LIMIT" in removed.reason
    assert trim.trim().entries == 0


def test_an_entry_in_use_stays(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = prepare(write(tmp_path / "a.jsonl", alpaca(40)))
    (mine,) = entries(cache)
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\nfrom pathlib import Path\n"
        f"from preparing import prepare\nfrom glasstune.data import chunks\nchunks.ROWS = 8\n"
        f"data = prepare(Path({str(write(tmp_path / 'b.jsonl', alpaca(41)))!r}))\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        (theirs,) = (path for path in entries(cache) if path != mine)
        monkeypatch.setenv("GLASSTUNE_CACHE_LIMIT", "0")
        assert trim.trim().entries == 0
        assert mine.exists()
        assert theirs.exists()
        other.kill()  # a lock ends with its process
    assert trim.trim().entries == 1
    assert not theirs.exists()
    assert used.train.documents[39].origin.endswith("a.jsonl:40")
    del used
    assert trim.trim().entries == 1
    assert entries(cache) == []


def test_what_a_killed_process_left_half_removed_goes(cache: Path) -> None:
    (cache / ".gone-x").mkdir(parents=True)
    (cache / ".gone-x" / "000000.arrow").write_bytes(b"x")
    assert trim.trim() == trim.Trimmed(0, 0, 20 << 30)
    assert not (cache / ".gone-x").exists()


def test_a_limit_that_is_no_size_is_said_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSTUNE_CACHE_LIMIT", "a lot")
    with pytest.raises(InputError) as error:
        prepare(write(tmp_path / "a.jsonl", alpaca(3)))
    assert (error.value.code, error.value.where) == ("bad_size", "GLASSTUNE_CACHE_LIMIT")
    assert not cache.exists()
