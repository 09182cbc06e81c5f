"""Every method on every family, against plain PEFT and transformers in float32."""

from __future__ import annotations

import pytest
import torch
from battery import ARCHITECTURES, save_battery_model
from merging import (
    METHODS,
    NO_BIAS,
    adapted,
    load_plain,
    logits_of,
    method_options,
    peft_merged,
    save_peft,
    stored,
)

from glasstune.workflows.merge import merge

SMALL = [
    ("llama", "lora", "float32"), ("llama", "dora", "float32"), ("llama", "bias_all", "bfloat16"),
    ("llama", "rslora", "bfloat16"), ("llama", "tokens", "float32"),
    ("llama", "norm_saved", "bfloat16"), ("llama", "few_layers", "float32"),
    ("llama_tied", "head", "float32"), ("llama_tied", "embedding", "float32"),
    ("llama_tied", "head_saved", "bfloat16"), ("llama_tied", "embedding_saved", "float32"),
    ("llama_tied", "tokens", "bfloat16"), ("llama_tied", "embedding_dora", "float32"),
    ("gpt2", "lora", "float32"), ("gpt2", "dora", "bfloat16"), ("gpt2", "lora_bias", "float32"),
    ("gpt2", "bias_lora_only", "float32"), ("bloom", "mixed", "float32"),
    ("bloom", "pattern_rslora", "bfloat16"), ("mixtral", "experts", "float32"),
    ("qwen3_moe", "experts", "bfloat16"), ("gemma3", "lora", "bfloat16"),
    ("phi3", "lora", "float16"), ("opt", "bias_all", "float32"), ("falcon", "lora", "float32"),
]  # fmt: skip
ALL = [
    (family, method, dtype)
    for family in sorted(ARCHITECTURES)
    for method in METHODS
    for dtype in ("float32", "bfloat16", "float16")
]


def _runs(family: str, method: str) -> bool:
    """Whether PEFT itself knows the combination."""
    if method == "experts":
        return family in ("mixtral", "qwen3_moe")
    if method == "lora_bias":
        return family in ("gpt2", "bloom")
    return True


def check(family: str, method: str, dtype: str, folder) -> None:
    """Merges by the workflow and compares weights and logits with plain PEFT's."""
    base = save_battery_model(family, folder)
    scale = 0.4 if method == "experts" else 0.1  # a product of two small ones hardly shows
    wrapped = adapted(base, method_options(family, method), scale=scale)
    adapter = save_peft(wrapped, folder / "adapter")
    truth = logits_of(wrapped)
    output = folder / "merged"
    record = merge(adapter, output, base=str(base), dtype=dtype)

    assert record.passed
    merged = load_plain(output)
    # In float32 the distance is that of two orders of summation; in 16 bit, of the rounding.
    limit = {"float32": 2e-5, "bfloat16": 0.05, "float16": 0.01}[dtype]
    apart = float((logits_of(merged) - truth).abs().max())
    assert apart <= limit * max(1.0, float(truth.abs().max()))
    if dtype == "float32":
        plain = logits_of(load_plain(base))
        assert float((plain - truth).abs().max()) > 30 * apart, "the adapter must matter here"

    ties = record.tied == "untied"
    if not ties:  # PEFT adds a tied head's change to the embedding too: its logits are wrong
        _same_weights(peft_merged(wrapped).state_dict(), merged.state_dict(), dtype)
    assert set(stored(base)) <= set(stored(output))
    assert {str(v.dtype) for v in stored(output).values()} == {f"torch.{dtype}"}


def _same_weights(theirs, ours, dtype: str) -> None:
    """Ours is theirs in float32, rounded once: no further than half a step of the type."""
    bits = {"float32": 21, "bfloat16": 7, "float16": 10}[dtype]
    for name, value in theirs.items():
        if not value.is_floating_point():
            continue
        step = 2.0 ** (torch.frexp(value.double())[1] - 1 - bits).double()
        floor = {"float16": 2.0**-24}.get(dtype, 0.0)  # below, steps no longer shrink
        # Both sums are float32 of terms up to the tensor's own size: they differ in the last bits,
        # and where one lies on the edge between two values of the type, so may the other.
        slack = 0.5 * step.clamp_min(floor) + 2.0**-22 * float(value.abs().max())
        far = (ours[name].double() - value.double()).abs() > slack
        assert not far.any(), f"{name}: {int(far.sum())} of {far.numel()} values"


@pytest.mark.parametrize(("family", "method", "dtype"), SMALL)
def test_merged_is_what_peft_computes(family, method, dtype, tmp_path):
    check(family, method, dtype, tmp_path)


@pytest.mark.slow(reason="14 families x 17 methods x 3 types: about 6 minutes")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_whole_battery(family, tmp_path):
    tried = 0
    for _, method, dtype in (entry for entry in ALL if entry[0] == family):
        if not _runs(family, method) or (method.startswith("bias") and family in NO_BIAS):
            continue
        folder = tmp_path / f"{method}-{dtype}"
        folder.mkdir()
        check(family, method, dtype, folder)
        tried += 1
    assert tried >= 30
