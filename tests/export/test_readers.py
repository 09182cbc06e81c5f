"""Who takes an adapter as it is: each reason against an adapter made by plain PEFT."""

from __future__ import annotations

import pytest
from battery import save_battery_model
from merging import METHODS, adapted, method_options, save_peft
from tiny import save_tiny_model

from glasstune.workflows.merge import merge

CASES = {
    # method: (vLLM, llama.cpp): None where it is accepted, else a word of the reason.
    "lora": (None, None),
    "rslora": (None, "rsLoRA is ignored: the scale would be 1.75 instead of 3.5"),
    "dora": ("DoRA", "DoRA"),
    "bias_all": ("biases", "biases"),
    "head_saved": ("modules_to_save is not supported (lm_head)", "whole saved modules"),
    "tokens": ("trainable_token_indices", "trainable_token_indices"),
    "mixed": ("rank_pattern", "alpha_pattern"),
}


@pytest.mark.parametrize("method", CASES)
def test_reasons(method, tmp_path):
    base = save_tiny_model(tmp_path / "base", attention_bias=True)
    adapter = save_peft(adapted(base, method_options("llama", method)), tmp_path / "adapter")
    readers = merge(adapter, tmp_path / "out", certificate=False).readers
    assert readers["peft"].accepts
    assert readers["peft"].reasons == []
    for name, reason in zip(("vllm", "llama.cpp"), CASES[method], strict=True):
        assert readers[name].accepts == (reason is None), readers[name].reasons
        assert reason is None or reason in " ".join(readers[name].reasons)


def test_large_ranks_experts_and_turned_layers(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    for rank, accepts, word in ((64, True, "--max-lora-rank 64"), (600, False, "rank 600")):
        wrapped = adapted(base, {"r": rank, "target_modules": ["q_proj"]})
        adapter = save_peft(wrapped, tmp_path / f"adapter{rank}")
        found = merge(adapter, tmp_path / f"out{rank}", certificate=False).readers["vllm"]
        assert found.accepts == accepts
        assert word in found.reasons[0]
    for family, method, word in (("mixtral", "experts", "parameters"), ("gpt2", "lora", "Conv1D")):
        base = save_battery_model(family, tmp_path)
        wrapped = adapted(base, method_options(family, method))
        adapter = save_peft(wrapped, tmp_path / f"adapter-{family}")
        found = merge(adapter, tmp_path / f"out-{family}", certificate=False).readers["vllm"]
        assert not found.accepts
        assert word in " ".join(found.reasons)
    assert "lora" in METHODS
