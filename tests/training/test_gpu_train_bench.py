"""The bench of real training at a toy size on a CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "bench" / "gpu_train.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_train", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(model: Path, data: Path, *more: str) -> list[str]:
    return [
        "gpu_train.py", "--model", str(model), "--data", str(data), "--device", "cpu",
        "--updates", "4", "--max-length", "128", "--peer-rows", "4", *more,
    ]  # fmt: skip


def test_both_sides_train_on_the_same_rows(bench, tiny_llama, qa_file, monkeypatch, capsys) -> None:
    """The same documents in the same updates: losses differ by bf16's rounding alone."""
    found = {}
    for case in ("ours", "peer"):
        words = options(tiny_llama, qa_file, "--part", "loss", "--case", case, "--seed", "3")
        monkeypatch.setattr(sys, "argv", words)
        bench.main()
        line = capsys.readouterr().out.strip().splitlines()[-1]
        assert line.startswith("RESULT ")
        found[case] = json.loads(line.removeprefix("RESULT "))
    ours, peer = found["ours"], found["peer"]
    assert ours["first_losses"] == pytest.approx(peer["first_losses"], rel=2e-3)
    assert len(set(ours["first_losses"])) == 3
    assert ours["held_out"] == pytest.approx(peer["held_out"], rel=1e-3)
    assert ours["tokens_per_second"] > 0
    assert peer["tokens_per_second"] > 0
    assert sum(ours["ways"].values()) == 14


def test_a_failed_case_is_a_line_too(bench, qa_file, tmp_path, monkeypatch, capsys) -> None:
    words = options(tmp_path / "nowhere", qa_file, "--part", "loss")
    monkeypatch.setattr(sys, "argv", words)
    found = bench.measure(bench.parse(), "ours", 0, 4)
    printed = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    assert printed == found
    assert found["case"] == "ours"
    assert found["error"]


def test_the_summary(bench, tiny_llama, qa_file, monkeypatch, capsys) -> None:
    """Means, spreads and ratios by hand."""
    held = {("ours", 0): 1.0, ("ours", 1): 3.0, ("peer", 0): 2.0, ("peer", 1): 4.0}
    speed = {("ours", 4): 900.0, ("peer", 4): 100.0, ("peer", 8): 300.0}

    def measure(args: Any, case: str, seed: int, rows: int) -> dict[str, Any]:
        if args.part == "loss":
            return {"held_out": held[case, seed]}
        return {"tokens_per_second": speed[case, rows]}

    monkeypatch.setattr(bench, "measure", measure)
    words = options(tiny_llama, qa_file, "--seeds", "0,1", "--peer-rows", "4,8")
    monkeypatch.setattr(sys, "argv", words)
    bench.main()
    lines = capsys.readouterr().out.strip().splitlines()
    losses, ratio = (json.loads(line.removeprefix("RESULT ")) for line in lines)
    assert losses["difference"] == -1.0
    assert losses["ours"] == {"mean": 2.0, "sd": pytest.approx(2**0.5), "losses": [1.0, 3.0]}
    assert ratio["ratio"] == 3.0
