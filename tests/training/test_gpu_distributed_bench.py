"""The bench of several GPUs at a toy size, on two CPU processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "bench" / "gpu_distributed.py"


@pytest.mark.slow(reason="torchrun imports everything in each of two processes")
@pytest.mark.parametrize("bits", [4, 16])
def test_every_part_prints_a_line(bits: int) -> None:
    words = [
        sys.executable, str(FILE), "--device", "cpu", "--ranks", "2", "--model", "toy",
        "--seq", "32", "--batch", "2", "--steps", "2", "--no-compile", "--bits", str(bits),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    found = {
        row["part"]: row for row in map(json.loads, (x.removeprefix("RESULT ") for x in lines))
    }
    assert list(found) == ["alone", "ddp", "exchange", "whole", "fsdp2"]
    assert found["ddp"]["weights_equal"] is True
    ratio = found["ddp"]["ms_alone"] / found["ddp"]["ms"]
    assert found["ddp"]["efficiency"] == pytest.approx(ratio, abs=0.02)
    assert found["fsdp2"]["same_losses"] is True
    assert found["fsdp2"]["sharded_bytes"] == found["fsdp2"]["frozen_layer_bytes"] // 2


@pytest.mark.slow(reason="torchrun imports everything in each of two processes")
def test_a_sharded_base_is_measured_at_every_precision_compiled_and_not() -> None:
    words = [
        sys.executable, str(FILE), "--device", "cpu", "--ranks", "2", "--model", "toy", "--seq",
        "32", "--batch", "2", "--few", "2", "--parts", "fsdp2", "--backend", "aot_eager",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    rows = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    found = {(row["bits"], row["compiled"]): row for row in rows if row["part"] == "fsdp2"}
    assert list(found) == [(bits, way) for bits in (4, 8, 16) for way in (False, True)]
    assert len(rows) == 2 * len(found)
    for (bits, compiled), row in found.items():
        if not compiled:
            assert row["same_losses"] is True
            continue
        assert row["late_graphs"] == 0
        assert set(row["modules"]) == ({"compiled only"} if bits == 16 else {"wide"})
        assert row["furthest_loss"] < 1e-3
        assert row["whole_modules"] == {"wide": 14}
