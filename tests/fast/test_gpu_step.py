"""The GPU benchmark at a toy size on a CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER

pytestmark = QUIET_COMPILER
FILE = Path(__file__).parents[2] / "bench" / "gpu_step.py"
TOY = ["--model", "toy", "--device", "cpu", "--seq", "16", "--batch", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_step", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(bench: Any, capsys: Any, *args: str) -> tuple[int, dict[str, Any]]:
    torch._dynamo.reset()
    code = bench.main([*TOY, *args])
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("RESULT ")
    return code, json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("bits", ["16", "8", "4"])
def test_a_measured_step(bits, bench, capsys, tmp_path) -> None:
    table = tmp_path / "table.txt"
    code, got = result(bench, capsys, "--bits", bits, "--compile", "false", "--profile", str(table))
    assert code == 0
    assert got["modules"] == {"wide": 14}
    assert got["ms"] > 0
    assert got["losses"][2] < got["losses"][0]
    assert got["versions"]["torch"] == torch.__version__
    assert "expand" in table.read_text() or bits == "16"
    _, plain = result(bench, capsys, "--bits", bits, "--way", "eager")
    assert got["losses"] == pytest.approx(plain["losses"], abs=2e-3)


@pytest.mark.parametrize("bits", ["16", "8", "4"])
def test_the_check(bits, bench, capsys, monkeypatch) -> None:
    from glasstune.kernels.lora_group import fused

    args = ("--bits", bits, "--check", "--compile", "false")
    code, got = result(bench, capsys, *args)
    assert code == 0, got
    assert 0 < got["distance"]["fast"] < 0.1
    right = fused.adapter_gradients
    monkeypatch.setattr(fused, "adapter_gradients", lambda *a: [2 * g for g in right(*a)])
    code, got = result(bench, capsys, *args)
    assert code == 1
    assert not got["ok"]


@pytest.mark.slow(reason="compiles two models")
def test_ways_with_compiled_blocks(bench, capsys) -> None:
    args = ("--backend", "aot_eager", "--budget", "0.5")
    _, fast = result(bench, capsys, *args)
    _, compiled = result(bench, capsys, *args, "--way", "compiled")
    assert fast["compiled"] == compiled["compiled"] == 3
    assert fast["losses"] == pytest.approx(compiled["losses"], abs=2e-3)
