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
def test_a_step_with_float8_products(bits, bench, capsys) -> None:
    args = ("--bits", bits, "--compile", "false")
    code, got = result(bench, capsys, *args, "--compute", "fp8")
    assert code == 0
    assert (got["compute"], got["modules"]) == ("fp8", {"wide": 14})
    _, plain = result(bench, capsys, *args)
    assert got["losses"] != plain["losses"]
    assert got["losses"] == pytest.approx(plain["losses"], abs=0.02)


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
@pytest.mark.parametrize("bits", ["16", "8", "4"])
def test_the_check(bits, compute, bench, capsys, monkeypatch) -> None:
    from glasstune.kernels.fp8 import op
    from glasstune.kernels.lora_group import fused

    args = ("--bits", bits, "--compute", compute, "--check", "--compile", "false")
    code, got = result(bench, capsys, *args)
    assert code == 0, got
    assert 0 < got["distance"]["fast"] < 0.1
    right, where = fused.adapter_gradients, fused if compute == "bf16" else op

    def doubled(*args: Any, **options: Any) -> Any:
        return [2 * grad for grad in right(*args, **options)]

    monkeypatch.setattr(where, "adapter_gradients", doubled)
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
