"""Numbers of all rows on disk: the same as if they were all sorted at once in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import alpaca, prepare

from glasstune.core.errors import RunError
from glasstune.data import chunks, packs, scratch
from glasstune.data import prepare as preparing
from glasstune.data.documents import StoredDocuments
from glasstune.data.ledger import percentiles
from glasstune.data.packs import PackTable, pack_documents
from glasstune.data.scratch import Numbers, Parts, blocks, gathered
from glasstune.data.split import HELD_OUT, TRAINED, Texts, hold_out


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Blocks of 40 rows, parts of 50, everything in files."""
    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "cache"))
    for module in (scratch, packs, preparing):
        monkeypatch.setattr(module, "BLOCK", 40)
    monkeypatch.setattr(scratch, "PART", 50)
    monkeypatch.setattr(scratch, "IN_MEMORY", 0)
    monkeypatch.setattr(chunks, "ROWS", 64)
    return tmp_path / "cache" / "data"


def test_numbers_are_what_was_added(small: Path) -> None:
    numbers = Numbers(np.int32)
    numbers.add(np.arange(100, dtype=np.int64))
    numbers.add(np.arange(0))
    numbers.add(np.array([-5]))
    whole = numbers.whole()
    assert isinstance(whole, np.memmap)
    assert whole.dtype == np.int32
    assert whole.tolist() == [*range(100), -5]
    assert [len(block) for block in blocks(whole)] == [40, 40, 21]
    assert np.concatenate(list(blocks(whole))).tolist() == whole.tolist()
    assert not list(small.iterdir())  # a file without a name
    assert Numbers(np.int64).whole().tolist() == []


def test_few_numbers_need_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "none"))
    numbers = Numbers(np.int32)
    numbers.add(np.arange(1000))
    assert numbers.whole().tolist() == list(range(1000))
    assert not (tmp_path / "none").exists()


def test_parts_keep_the_order_of_adding(small: Path) -> None:
    parts = Parts(3, [("number", "<i4"), ("wide", "<u8")])
    expected: dict[int, list[int]] = {0: [], 1: [], 2: []}
    chosen = np.random.default_rng(0)
    for start in range(0, 90, 30):
        part = chosen.integers(0, 2, 30)  # nothing in the last
        records = np.zeros(30, dtype=parts.dtype)
        records["number"] = np.arange(start, start + 30)
        parts.add(part, records)
        for at, number in zip(part.tolist(), records["number"].tolist(), strict=True):
            expected[at].append(number)
    assert {k: parts.part(k)["number"].tolist() for k in range(3)} == expected


def test_small_arrays_are_joined_to_blocks(small: Path) -> None:
    found = [block.tolist() for block in gathered(np.arange(k) for k in (30, 20, 5, 0))]
    assert found == [[*range(30), *range(20)], [*range(5)]]


def at_once(lengths: list[int], limit: int, seed: int) -> list[list[int]]:
    """Best fit, longest first, in plain lists: what the parts must come to."""
    raw = np.random.PCG64(np.random.SeedSequence([seed, 1])).random_raw(len(lengths)).tolist()
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], raw[k]))
    rows: list[list[int]] = []
    left: list[int] = []
    opened: dict[int, list[int]] = {}
    for k in order:
        room = min((r for r, found in opened.items() if found and r >= lengths[k]), default=None)
        if room is None:
            pack, room = len(rows), limit
            rows.append([])
            left.append(limit)
        else:
            pack = opened[room].pop()
        rows[pack].append(k)
        left[pack] = room - lengths[k]
        opened.setdefault(left[pack], []).append(pack)
    return rows


@pytest.mark.parametrize("kind", ["mixed", "all equal", "two lengths", "one a pack", "none"])
def test_packs_in_parts_are_packs_at_once(small: Path, kind: str) -> None:
    chosen = np.random.default_rng(1)
    lengths = {
        "mixed": chosen.integers(1, 60, 500),
        "all equal": np.full(400, 16),
        "two lengths": chosen.choice([3, 60], 500),
        "one a pack": chosen.integers(40, 64, 300),
        "none": np.zeros(0, dtype=np.int64),
    }[kind].tolist()
    found = pack_documents(lengths, 64, 7)
    assert [pack.tolist() for pack in found] == at_once(lengths, 64, 7)


def test_rows_of_one_document_each(small: Path) -> None:
    table = PackTable.singles(95)
    assert [pack.tolist() for pack in table] == [[k] for k in range(95)]
    assert table[-1].tolist() == [94]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
def test_the_texts_that_are_held_out_do_not_hang_on_parts(
    small: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = np.random.default_rng(0).integers(0, 2**64 - 1, 300, dtype=np.uint64)
    keys = np.concatenate([keys, keys[:100]])
    found = []
    for part in (50, 1000):
        monkeypatch.setattr(scratch, "PART", part)
        sides = np.full(len(keys), TRAINED, dtype=np.uint8)
        texts = Texts(blocks(keys), len(keys), 5)
        rows = [part.rows for part in texts]
        assert len(rows) == (8 if part == 50 else 1)
        assert sorted(np.concatenate(rows).tolist()) == list(range(400))
        hold_out(texts, sides, share)
        found.append(sides.tolist())
    assert found[0] == found[1]
    assert sides[:100].tolist() == sides[300:].tolist()
    assert (sides[:300] == HELD_OUT).sum() == round(share * 300)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    chosen = np.random.default_rng(seed)
    made = [
        {**row, "output": "so " * int(chosen.integers(1, 90))}
        for row in alpaca(count)
    ]  # fmt: skip
    return made + [made[int(k)] for k in chosen.integers(0, count, count // 5)]


@pytest.mark.parametrize("options", [
    {"validation_split": 0.1}, {"duplicates": "drop", "validation_split": 0.05},
    {"packing": False}, {"max_length": 100},
])  # fmt: skip
def test_a_data_set_does_not_hang_on_blocks_and_parts(
    small: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for seed in (0, 1):
        paths.append(tmp_path / f"{seed}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows(200, seed)))
    sources: list[dict[str, Any]] = [
        {"path": str(paths[0]), "repeat": 1.5},
        {"path": str(paths[1])},
    ]
    files = prepare([dict(source) for source in sources], **options)
    assert isinstance(files.train.documents, StoredDocuments)
    assert isinstance(files.train.documents.rows, np.memmap)
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "ROWS", 64)  # a fingerprint goes piece by piece
    memory = prepare([dict(source) for source in sources], **options)
    assert files.fingerprint == memory.fingerprint
    assert files.record.to_dict() == memory.record.to_dict()


def test_repeats_are_counted_over_parts(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    made = rows(300, 2)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    counts = Counter(row["instruction"] for row in made)
    data = prepare(path)
    assert data.record.duplicates == sum(counts.values()) - len(counts) == 60
    note = next(found for found in data.record.findings if found.code == "duplicates")
    first = [k for k, row in enumerate(made[:300], 1) if counts[row["instruction"]] > 1]
    assert note.where == f"{path}:{first[0]}"
    assert ", ".join(map(str, first[1:5])) in note.message
    assert f"({len(first)} texts" in note.message


def test_percentiles_are_those_of_numpy() -> None:
    chosen = np.random.default_rng(3)
    for count in (1, 2, 7, 100, 1001):
        lengths = chosen.integers(1, 700, count)
        assert percentiles(np.bincount(lengths)) == {
            "p50": int(np.percentile(lengths, 50)),
            "p95": int(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        }


def test_tokenising_needs_no_pandas(tmp_path: Path) -> None:
    """It would cost every process a third of a second and tens of megabytes."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in alpaca(20)))
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\nfrom pathlib import Path\n"
        f"from preparing import prepare\nprepare(Path({str(path)!r}), keep_columns=True)\n"
        "print('pandas' in sys.modules)"
    )
    environment = {**os.environ, "GLASSTUNE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=True
    )
    assert done.stdout == b"False\n"


def test_a_full_disk_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(RunError) as error:
        prepare(alpaca(100))
    assert error.value.code == "disk_full"
    assert "GLASSTUNE_CACHE" in error.value.fix
