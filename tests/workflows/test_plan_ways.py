"""What a refused run is told to change: each way out that is printed, applied, is accepted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from runs import QuietProgress, tiny_run
from tiny import save_tiny_model

from glasstune.core.errors import InputError
from glasstune.core.units import format_bytes_up, parse_bytes
from glasstune.workflows.plan import plan

HELD = 100 * 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("ways") / "model", num_hidden_layers=4, hidden_size=128,
        intermediate_size=512, vocab_size=4096,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows, of which one in four is long."""
    file = tmp_path_factory.mktemp("ways") / "rows.json"
    content = [
        {"instruction": f"Count from {number}.", "output": " and".join(["on"] * long)}
        for number in range(40)
        for long in [65 if number % 4 == 0 else 5 + number % 4]
    ]
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of one size: the tests' own grows with each plan."""
    monkeypatch.setattr("glasstune.planner.host.resident_bytes", lambda: HELD)


def planned(model: Path, data: Path, output: Path, limit: str, **more: Any) -> Any:
    sections: dict[str, dict[str, Any]] = {
        "model": {"dtype": "bfloat16"},
        "data": {"packing": False, "validation_split": 0.1, "max_length": 256},
        "training": {
            "train_batch_size": 8, "per_device_train_batch_size": 8, "recompute": "none",
            "max_memory": limit,
        },
    }  # fmt: skip
    for key, value in more.items():
        section, _, name = key.partition("__")
        sections[section][name] = value
    return plan(tiny_run(model, data, output, **sections), progress=QuietProgress())


def ways(error: InputError) -> list[tuple[dict[str, Any], bool]]:
    """Reads each way out: the keys to set, and whether it is said to be enough."""
    found = []
    for text in error.fix.split("; or "):
        pairs = re.findall(r"(training|model|data)\.(\w+): ([\w.]+(?: [KMG]iB)?)", text)
        changes = {f"{section}__{name}": value for section, name, value in pairs}
        for name in changes:
            if changes[name].isdigit():
                changes[name] = int(changes[name])
        found.append((changes, "still too much" not in text))
    return found


def refused(model: Path, data: Path, output: Path, limit: str, **more: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        planned(model, data, output, limit, **more)
    assert caught.value.code == "does_not_fit"
    return caught.value


@pytest.mark.parametrize(
    "share", [0.6, pytest.param(0.075, marks=pytest.mark.slow(reason="20 s of plans"))]
)
def test_every_way_out_is_accepted(model: Path, rows: Path, tmp_path: Path, share: float) -> None:
    """From a little too large to far too large: then only several changes at once are enough."""
    output = tmp_path / "run"
    free = planned(model, rows, output, "100GiB").peak_bytes
    limit = str(HELD + round(share * (free - HELD)))
    error = refused(model, rows, output, limit)
    found = ways(error)
    needed = re.search(r"needs ([\d.]+ MiB)", error.message)
    assert needed is not None
    assert planned(model, rows, output, needed[1]).fits
    assert len(found) == 3
    assert all(changes for changes, _ in found), error.fix
    assert sum(enough for _, enough in found) >= 2, error.fix
    if share < 0.1:  # nothing is enough alone
        assert "model.bits: 4 with data.max_length: 112, which drops 22% of the rows (" in error.fix
    for changes, enough in found:
        given = {"training__max_memory": limit, **changes}
        size = given.pop("training__max_memory")
        if enough:
            assert planned(model, rows, output, size, **given).fits
        else:
            refused(model, rows, output, size, **given)


@pytest.mark.parametrize(
    "count", [0, 1, 1023, 1024, 1025, 466 * 2**20 + 1, 10**9, 2**40 - 1, 2**41]
)
def test_a_size_rounded_up_is_no_less(count: int) -> None:
    back = parse_bytes(format_bytes_up(count))
    assert count <= back <= 1.11 * count + 1
    for more in range(count, count + 50):
        assert parse_bytes(format_bytes_up(more)) >= more
