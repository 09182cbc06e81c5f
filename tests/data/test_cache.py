"""Tokenised rows on disk: found again only for the same rows, never half, never damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer
from preparing import CHATML, FACTS, alpaca, prepare

from glasstune.core.choices import Choices
from glasstune.core.errors import InputError, RunError
from glasstune.data import chunks, keys, tokenise
from glasstune.data.prepare import PreparedData
from glasstune.data.template import resolve_template


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and pieces of 8 rows."""
    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chunks, "ROWS", 8)
    return tmp_path / "cache" / "data"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in alpaca(50)))
    return path


def how(sources: Any, **options: Any) -> tuple[PreparedData, str]:
    """Prepares, and says whether the rows of the first source were `made` or `read`."""
    choices = Choices()
    data = prepare(sources, choices=choices, **options)
    choice = choices.get(f"data.cache.{data.sources[0]}")
    assert choice is not None
    return data, str(choice.value)


def same(one: PreparedData, two: PreparedData) -> bool:
    pairs = zip(one.train.documents, two.train.documents, strict=True)
    return (
        all(
            np.array_equal(a.ids, b.ids)
            and np.array_equal(a.labels, b.labels)
            and (a.origin, a.source, a.columns) == (b.origin, b.source, b.columns)
            for a, b in pairs
        )
        and one.fingerprint == two.fingerprint
        and one.record.to_dict() == two.record.to_dict()
    )


def test_the_second_time_nothing_is_tokenised(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, made = how(file)
    monkeypatch.setattr(tokenise, "do", None)
    second, read = how(file)
    assert (made, read) == ("made", "read")
    assert same(first, second)


def test_rows_on_disk_are_rows_in_memory(file: Path) -> None:
    rows = alpaca(50)
    rows[3]["output"] = "<mine> Grüße \u4e8c"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    disk, memory = prepare(file, validation_split=0.2), prepare(rows, validation_split=0.2)
    assert disk.fingerprint == memory.fingerprint
    assert [d.ids.tolist() for d in disk.train.documents] == [
        d.ids.tolist() for d in memory.train.documents
    ]
    assert disk.record.scripts == memory.record.scripts


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_any_number_of_processes_gives_the_same(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glasstune.data.write import write_rows

    rows = [{**row, "score": str(k)} for k, row in enumerate(alpaca(50))]
    rows[20]["output"] = rows[21]["output"] = ""
    path = write_rows(rows, tmp_path / name)
    found = []
    for number in (1, 2):
        monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / f"cache-{number}"))
        found.append(prepare(path, keep_columns=True, validation_split=0.1, processes=number))
    assert same(*found)
    scores = {document.columns["score"] for document in found[0].train.documents}
    assert len(scores) > 40
    files = [
        sorted((p.relative_to(tmp_path / f"cache-{n}"), p.read_bytes())
               for p in (tmp_path / f"cache-{n}").rglob("0*.*"))
        for n in (1, 2)
    ]  # fmt: skip
    assert files[0] == files[1]  # byte for byte
    assert len(files[0]) == 2 * 7


def test_l03_every_part_of_the_key_makes_new_rows(file: Path) -> None:
    how(file)
    assert how(file)[1] == "read"
    other = chat_tokenizer("chatml")
    other.add_tokens(["<mine>"])
    changed: dict[str, dict[str, Any]] = {
        "tokenizer": {"tokenizer": other},
        "template": {"chat_template": "plain"},
        "max_length": {"max_length": 512},
        "truncation": {"truncation": "cut"},
        "train_on": {"train_on": "all"},
        "columns": {"keep_columns": True},
        "kwargs": {"chat_template_kwargs": {"x": 1}},
    }
    for name, options in changed.items():
        assert how(file, **options)[1] == "made", name
        assert how(file, **options)[1] == "read", name
    text = file.read_text()
    file.write_text(text.replace("Because 7", "Because 8"))  # one byte
    data, value = how(file)
    assert value == "made"
    assert "Because 8" in CHATML.decode(data.train.documents[7].ids)
    assert [how(file, **{key: value})[1] for key, value in (
        ("packing", False), ("validation_split", 0.1), ("duplicates", "drop"), ("seed", 4),
        ("on_error", "skip"), ("num_workers", 3),
    )] == ["read"] * 6  # fmt: skip


def test_l03_the_code_version_is_part_of_the_key(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how(file)
    monkeypatch.setattr(keys, "CODE", keys.CODE + 1)
    assert how(file)[1] == "made"


def test_tokenizer_hash_sees_the_state_and_not_the_last_call() -> None:
    tokenizer = chat_tokenizer("chatml")
    before = keys.tokenizer_hash(tokenizer)
    tokenizer(["a", "a b c"], truncation=True, max_length=2)
    assert keys.tokenizer_hash(tokenizer) == before
    tokenizer.pad_token = "<|im_start|>"
    assert keys.tokenizer_hash(tokenizer) != before


@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "note", "note gone"])
def test_a_damaged_piece_is_made_again(file: Path, cache: Path, harm: str) -> None:
    first, _ = how(file)
    shard = next(cache.rglob("000003.arrow"))
    note, good = shard.with_suffix(".json"), shard.read_bytes()
    others = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow") if path != shard}
    if harm == "cut":
        shard.write_bytes(good[: len(good) // 2])
    elif harm == "flip":
        middle = len(good) // 2
        shard.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    elif harm == "gone":
        shard.unlink()
    elif harm == "note":
        note.write_text(note.read_text().replace('"rows": 8', '"rows": 7'))
    else:
        note.unlink()
    second, value = how(file)
    assert value == "made"
    assert same(first, second)
    assert shard.read_bytes() == good
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_an_entry_without_its_mark_is_not_used(file: Path, cache: Path) -> None:
    how(file)
    next(cache.rglob("complete.json")).unlink()
    assert how(file)[1] == "made"


def test_a_file_that_changes_while_it_is_read_is_an_error(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tokenise.do

    def slow(worker: Any, job: Any) -> int:
        with file.open("a") as other:
            other.write(json.dumps(alpaca(1)[0]) + "\n")
        return real(worker, job)

    monkeypatch.setattr(tokenise, "do", slow)
    with pytest.raises(InputError) as error:
        prepare(file)
    assert (error.value.code, error.value.where) == ("file_changed", str(file))
    monkeypatch.undo()
    assert not list(cache.rglob("complete.json"))


def test_a_cache_that_cannot_be_written_names_the_way_out(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "taken"))
    with pytest.raises(InputError, match="cannot be written") as error:
        prepare(file)
    assert "GLASSTUNE_CACHE" in error.value.fix


def test_a_full_disk_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glasstune.data.cache._write", full)
    with pytest.raises(RunError) as error:
        prepare(file)
    assert error.value.code == "disk_full"
    assert "GLASSTUNE_CACHE" in error.value.fix


def test_a_worker_that_dies_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glasstune.data import processes

    start = "import sys; sys.path[:] = {path!r}; import os, signal; from glasstune.data import "
    start += "processes as p; p.do = lambda *_: os.kill(os.getpid(), signal.SIGKILL); p.serve()"
    monkeypatch.setattr(processes, "_START", start)
    with pytest.raises(RunError) as error:
        prepare(file, processes=2)
    assert error.value.code == "worker_died"
    assert "-9" in error.value.message
    monkeypatch.undo()


def test_an_error_inside_a_worker_is_the_users_error(file: Path) -> None:
    with file.open("ab") as other:
        other.write(b'{"instruction": "\xe9", "output": "a"}\n')
    with pytest.raises(InputError) as error:
        prepare(file, processes=2)
    assert (error.value.code, error.value.where) == ("not_utf8", f"{file}:51")


def test_a_tokenizer_that_cannot_be_sent_works_alone_and_it_is_said(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.holds = lambda: None
    choices = Choices()
    data = prepare(file, tokenizer, choices=choices, processes=2)
    choice = choices.get("data.processes")
    assert choice is not None
    assert choice.value == 1
    assert "cannot be handed" in choice.reason
    assert data.record.kept == 50


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:] = {path!r}
from preparing import prepare
from glasstune.data import chunks, tokenise
chunks.ROWS = 8
real = tokenise.do
def do(worker, job):
    if job.chunk.number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(worker, job)
tokenise.do = do
prepare(Path({file!r}))
"""


def test_after_a_kill_finished_pieces_are_used(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = KILLED.format(path=sys.path, file=str(file))
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    there = {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    assert sorted(there) == [f"{k:06d}.arrow" for k in range(4)]
    numbers: list[int] = []
    real = tokenise.do

    def count(worker: Any, job: Any) -> int:
        numbers.append(job.chunk.number)
        return real(worker, job)

    monkeypatch.setattr(tokenise, "do", count)
    resumed, _ = how(file)
    assert numbers == [4, 5, 6]
    assert {path.name: path.stat().st_mtime_ns for path in cache.rglob("00000[0-3].arrow")} == there
    monkeypatch.setenv("GLASSTUNE_CACHE", str(cache.parent.parent / "other"))
    assert same(resumed, how(file)[0])


@pytest.mark.slow(reason="kills the command with its workers at random moments")
def test_kills_at_any_moment_leave_the_same_rows(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in alpaca(4000)))
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\nfrom pathlib import Path\n"
        "from preparing import prepare\nfrom glasstune.data import chunks\nchunks.ROWS = 50\n"
        f"print(prepare(Path({str(path)!r}), processes=2).fingerprint)"
    )
    command = [sys.executable, "-c", script]
    for pieces in (3, 20, 45):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as run:
            while len(list(cache.rglob("*.arrow"))) < pieces:
                assert run.poll() is None
                time.sleep(0.002)
            os.killpg(run.pid, signal.SIGKILL)
        assert not list(cache.rglob("complete.json"))
    resumed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "fresh"))
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == resumed


def test_two_processes_of_one_entry_wait_for_each_other(file: Path, cache: Path) -> None:
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\nfrom pathlib import Path\n"
        "from preparing import prepare\nfrom glasstune.data import chunks\nchunks.ROWS = 8\n"
        f"print(prepare(Path({str(file)!r})).fingerprint)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(2)
    ]
    prints = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(prints) == 1


def test_rows_of_the_hub_are_found_by_their_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    tables = {"train": datasets.Dataset.from_list(alpaca(20))}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: tables[split])
    source = [{"path": "owner/set"}]
    first, made = how(source)
    assert (made, how(source)[1]) == ("made", "read")
    assert first.train.documents[3].origin == "owner/set/train[3]"
    assert first.fingerprint == prepare(alpaca(20)).fingerprint
    two = prepare(source, processes=2)
    assert two.fingerprint == first.fingerprint
    tables["train"] = datasets.Dataset.from_list(alpaca(21))
    assert how(source)[1] == "made"


class Remembered:
    """A progress that adds up what it is told."""

    def __init__(self) -> None:
        self.totals: list[tuple[int | None, str]] = []
        self.done = 0
        self.fields: dict[str, Any] = {}
        self.finished = 0

    def start(self, task: str, total: int | None, unit: str) -> None:
        self.totals.append((total, unit))

    def advance(self, task: str, amount: int = 1, **fields: Any) -> None:
        self.done += amount
        self.fields.update(fields)

    def finish(self, task: str) -> None:
        self.finished += 1

    def say(self, text: str) -> None: ...


def test_the_bar_knows_its_end_and_the_rate(tmp_path: Path) -> None:
    from glasstune.core.config import DataConfig
    from glasstune.data.prepare import prepare_data
    from glasstune.data.write import write_rows

    for name in ("x.jsonl", "x.json", "x.csv"):
        bar = Remembered()
        path = write_rows(alpaca(500), tmp_path / name)
        config = DataConfig(sources=[{"path": str(path)}])  # type: ignore[list-item]
        prepare_data(config, CHATML, FACTS, seed=0, choices=Choices(), progress=bar)
        ((total, unit),) = bar.totals
        assert unit == "kB"
        assert total is not None
        assert total == -(-path.stat().st_size // 1000)
        assert total - 1 <= bar.done <= total
        assert bar.fields["rows"] == "500"
        assert float(bar.fields["rows/s"].replace(",", "")) > 0
        assert bar.finished == 1


def test_template_parts_are_those_of_the_ids() -> None:
    tokenizer = chat_tokenizer("llama3")
    dates = [
        keys.template_parts(resolve_template(tokenizer, None, {"pinned_date": date}))
        for date in ("2024-07-26", "2024-07-27")
    ]
    assert dates[0]["source"] != dates[1]["source"]
