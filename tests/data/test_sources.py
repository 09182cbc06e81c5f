import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from glasstune.core.config import SourceConfig
from glasstune.core.errors import InputError
from glasstune.data.read import BadRow, RawRow, ReadStats
from glasstune.data.sources import read_source, source_names


def read(source: SourceConfig, base: Path) -> list[Any]:
    return list(read_source(source, base, ReadStats()))


def test_glob_reads_files_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    rows = read(SourceConfig(path="*.jsonl"), tmp_path)
    assert [row.value["text"] for row in rows] == ["a.jsonl", "b.jsonl"]
    deep = read(SourceConfig(path="**/*.jsonl"), tmp_path)
    assert [row.value["text"] for row in deep] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_glob_without_match(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file matches") as error:
        read(SourceConfig(path="*.jsonl"), tmp_path)
    assert error.value.code == "no_file_matches"


def test_file_whose_name_holds_brackets(tmp_path: Path) -> None:
    (tmp_path / "x[1].jsonl").write_text('{"text": "t"}')
    assert len(read(SourceConfig(path="x[1].jsonl"), tmp_path)) == 1


@pytest.mark.parametrize("path", ["alpca.json", "./alpca", "nowhere/alpaca.json"])
def test_missing_file_names_the_nearest(tmp_path: Path, path: str) -> None:
    (tmp_path / "alpaca.json").write_text("[]")
    with pytest.raises(InputError) as error:
        read(SourceConfig(path=path), tmp_path)
    assert error.value.code == "no_such_file"
    assert str(tmp_path) in error.value.where
    if not path.startswith("nowhere"):
        assert "alpaca.json" in error.value.fix


def test_rows_from_python(tmp_path: Path) -> None:
    source = SourceConfig(path=[{"text": "a"}, "no dict"])  # type: ignore[arg-type]
    rows = read(source, tmp_path)
    assert rows[0] == RawRow({"text": "a"}, "rows[0]")
    assert isinstance(rows[1], BadRow)
    assert "rows" not in source.model_dump()


def test_names_are_stems_and_stay_apart() -> None:
    sources = [
        SourceConfig(path="x/alpaca.json"),
        SourceConfig(path="y/alpaca.jsonl"),
        SourceConfig(path="owner/set"),
        SourceConfig(path="folder/*.jsonl"),
        SourceConfig(path="z.json", name="mine"),
        SourceConfig(path=[{}]),  # type: ignore[arg-type]
    ]
    assert source_names(sources) == ("alpaca", "alpaca-2", "set", "folder", "mine", "rows")
    with pytest.raises(InputError, match="named 'a'"):
        source_names([SourceConfig(path="p", name="a"), SourceConfig(path="q", name="a")])


def test_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = SourceConfig(path="owner/set", subset="en", split="train[:2]")
    rows = read(source, tmp_path)
    assert rows == [
        RawRow({"text": "a"}, "owner/set/train[:2][0]"),
        RawRow({"text": "b"}, "owner/set/train[:2][1]"),
    ]
    assert asked == [(("owner/set", "en"), {"split": "train[:2]"})]


def _offline() -> Exception:
    return ConnectionError("Couldn't reach 'owner/set' on the Hub (OfflineModeIsEnabled)")


def _missing() -> Exception:
    return datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' doesn't exist on the Hub")


def _gated() -> Exception:
    return datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' is a gated dataset")


@pytest.mark.parametrize(
    ("cause", "code", "hint"),
    [
        (_offline, "hub_unreachable", "HF_ENDPOINT"),
        (_missing, "hub_not_found", "spelling"),
        (_gated, "hub_forbidden", "https://huggingface.co/datasets/owner/set"),
        (lambda: ValueError('Unknown split "nope"'), "hub_error", "split"),
    ],
)
def test_hub_failures_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Any, code: str, hint: str
) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise cause()

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError) as error:
        read(SourceConfig(path="owner/set", split="nope"), tmp_path)
    assert error.value.code == code
    assert hint in error.value.fix


@pytest.mark.parametrize("key", ["subset", "split"])
def test_what_belongs_to_the_hub_is_refused_beside_a_file(tmp_path: Path, key: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "t"}')
    with pytest.raises(InputError, match=key) as error:
        read(SourceConfig(path="x.jsonl", **{key: "train[:10]"}), tmp_path)
    assert error.value.code == "not_for_files"
    assert len(read(SourceConfig(path="x.jsonl", split="train"), tmp_path)) == 1
