"""What else a plan says: the disk, a limit above what is free, layers one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import QuietProgress, tiny_run

from glasstune.core.choices import Choices
from glasstune.planner.host import resident_bytes
from glasstune.workflows.plan import plan_run
from glasstune.workflows.prepare_run import prepare
from glasstune.workflows.train import train


def planned(config: Any) -> Any:
    return plan_run(prepare(config, Choices(), QuietProgress()), QuietProgress())


def test_what_a_run_keeps_on_the_disk_is_foretold(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"max_steps": 6, "save_steps": 2, "save_total_limit": None, "eval_steps": 6}
    found = planned(tiny_run(tiny_llama, qa_file, tmp_path / "run", training=training))
    train(
        tiny_run(tiny_llama, qa_file, tmp_path / "run", training=training), progress=QuietProgress()
    )
    weights = [*(tmp_path / "run").rglob("*.safetensors"), *(tmp_path / "run").rglob("*optim*")]
    real = sum(path.stat().st_size for path in weights if path.is_file())
    # One more may be the best beside the newest; files have headers.
    whole = found.record.disk_bytes
    one = (whole - found.record.moments[1].parts["adapters"]) // 4
    assert whole - one <= real <= whole * 1.2
    assert not [f for f in found.record.findings if f.code == "disk_short"]
    usage = type("Usage", (), {"free": whole - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    again = planned(tiny_run(tiny_llama, qa_file, tmp_path / "other", training=training))
    assert [f.code for f in again.record.findings] == ["disk_short"]


def test_a_run_says_by_how_much_its_plan_was_off(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glasstune.workflows.plan.SMALL", 0)
    progress = QuietProgress()
    record = train(
        tiny_run(tiny_llama, qa_file, tmp_path / "run", training={"max_steps": 2}),
        progress=progress,
    )
    held = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["plan"]
    assert held["measured_peak_bytes"] == record.peak_memory_bytes  # type: ignore[union-attr]
    assert held["error"] == pytest.approx(held["peak_bytes"] / held["measured_peak_bytes"] - 1)
    assert any(f"were planned ({held['error']:+.1%})" in line for line in progress.lines)


def test_a_limit_above_what_is_free_is_said(
    tiny_llama: Path, qa_file: Path, tmp_path: Path
) -> None:
    def said(limit: str) -> list[str]:
        run = tiny_run(tiny_llama, qa_file, tmp_path / "run", training={"max_memory": limit})
        return [finding.code for finding in planned(run).record.findings]

    assert said("900TiB") == ["max_memory_above_free"]
    # What this process holds already counts on a CPU, and a test worker may hold much.
    assert said(f"{resident_bytes() / 2**30 + 1:.1f}GiB") == []


def test_each_layer_has_its_bytes(tiny_llama: Path, qa_file: Path, tmp_path: Path) -> None:
    record = planned(tiny_run(tiny_llama, qa_file, tmp_path / "run")).record
    full = planned(
        tiny_run(tiny_llama, qa_file, tmp_path / "run", training={"recompute": "full"})
    ).record
    assert len(record.layer_bytes) == record.layers == 2
    assert all(b < a for a, b in zip(record.layer_bytes, full.layer_bytes, strict=True))
    assert sum(record.layer_bytes) <= max(m.parts["activations"] for m in record.moments)
