"""What a path means: run, adapter or model, and which checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glasstune.core.errors import InputError
from glasstune.workflows.open_model import locate, open_model

CONFIG = """
model: {path: some/base, bits: 4}
data: {sources: [{path: rows.jsonl}], max_length: 77}
"""


def make_run(folder: Path, steps: tuple[int, ...] = (), adapter: bool = True) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "run.json").write_text("{}")
    if adapter:
        make_adapter(folder / "adapter")
    for step in steps:
        make_adapter(folder / "checkpoints" / f"step-{step}")
        (folder / "checkpoints" / f"step-{step}" / "complete.json").write_text("{}")
    return folder


def make_adapter(folder: Path, base: str | None = "some/other") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def test_a_run_gives_base_precision_and_data(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run", steps=(9, 10))
    found = locate(str(run))
    assert (found.kind, found.model.path, found.model.bits) == ("run", "some/base", 4)
    assert found.adapter == run / "adapter"
    assert found.data is not None
    assert found.data.max_length == 77
    assert locate(str(run), "best").adapter == run / "adapter"
    assert locate(str(run), "step-9").adapter == run / "checkpoints" / "step-9"
    # 10 is newer than 9, though not by the alphabet.
    assert locate(str(run), "last").adapter == run / "checkpoints" / "step-10"


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=(3,))
    make_adapter(run / "checkpoints" / "step-4")
    assert locate(str(run), "last").adapter == run / "checkpoints" / "step-3"
    with pytest.raises(InputError, match="'step-4'; it has step-3"):
        locate(str(run), "step-4")


def test_a_run_that_did_not_end_names_its_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=(3, 6), adapter=False)
    with pytest.raises(InputError, match="it has step-3, step-6"):
        locate(str(run))
    empty = make_run(tmp_path / "empty", adapter=False)
    with pytest.raises(InputError, match="no complete checkpoint"):
        locate(str(empty), "last")


def test_a_bare_adapter_names_its_base(tmp_path: Path) -> None:
    found = locate(str(make_adapter(tmp_path / "adapter")))
    assert (found.kind, found.model.path, found.model.bits) == ("adapter", "some/other", 16)


@pytest.mark.parametrize("inside", ["adapter", "checkpoints/step-5"])
def test_an_adapter_inside_a_run_takes_the_runs_base(tmp_path: Path, inside: str) -> None:
    run = make_run(tmp_path / "run", steps=(5,))
    found = locate(str(run / inside))
    assert (found.model.path, found.model.bits, found.adapter) == ("some/base", 4, run / inside)


def test_adapter_without_a_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which base model"):
        locate(str(make_adapter(tmp_path / "adapter", base=None)))


def test_anything_else_is_a_model_and_has_no_checkpoints(tmp_path: Path) -> None:
    assert locate("org/name").model.path == "org/name"
    with pytest.raises(InputError, match="only a run folder has checkpoints"):
        locate("org/name", "last")
    with pytest.raises(InputError, match="only a run folder has checkpoints"):
        locate(str(make_adapter(tmp_path / "adapter")), "best")


def test_a_wrong_checkpoint_name_lists_the_forms(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        locate(str(make_run(tmp_path / "run")), "newest")
    assert "best, last or step-N" in caught.value.fix


@pytest.mark.parametrize("option", [{"bits": 5}, {"dtype": "int7"}, {"device": "gpu"}])
def test_a_wrong_option_is_the_users_error(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        open_model(str(tmp_path), **option)
    assert next(iter(option)) in str(error.value)
    assert "expected" in error.value.message
