"""Truth for quantisation errors: real loads that bitsandbytes expands, and tiny checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from families import family_config
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from glasstune.core.inspection import ErrorReport, LayerError

OPTIONS: dict[str, dict[str, Any]] = {
    "8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4_double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}

Truth = dict[str, dict[str, Any]]
"""Path to `shape`, `weight` (norm), and by precision the norm of what moved and the worst row."""


def real_loads(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Truth:
    """Loads a folder at 16 bit and at each precision, and compares in float64."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    truth: Truth = {}
    for key, options in OPTIONS.items():
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(**options),
        )
        for path, module in loaded.named_modules():
            if not isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
                continue
            state = module.state if key == "8" else None
            stored = dequantize_bnb_weight(module.weight, state).detach().double()
            original = plain.get_submodule(path)
            weight = original.weight.detach().double()
            weight = weight.T if isinstance(original, Conv1D) else weight
            entry = truth.setdefault(
                path, {"shape": list(weight.shape), "weight": float(weight.norm())}
            )
            moved = stored - weight
            entry[key] = float(moved.norm())
            entry[f"{key} row"] = float((moved.norm(dim=1) / weight.norm(dim=1)).max())
    return truth


def leaves_of(truth: Truth) -> list[tuple[str, list[int]]]:
    return [(path, entry["shape"]) for path, entry in truth.items()]


def by_path(report: ErrorReport) -> dict[str, LayerError]:
    return {layer.path: layer for layer in report.layers}


def codes(report: ErrorReport) -> set[str]:
    return {finding.code for finding in report.findings} - {"weights_read"}


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-6)


def linear_leaves(model: torch.nn.Module) -> list[tuple[str, list[int]]]:
    return [
        (path, [module.out_features, module.in_features])
        for path, module in model.named_modules()
        if type(module) is torch.nn.Linear and "lm_head" not in path
    ]


def save_random(model: torch.nn.Module, folder: Path, **options: Any) -> Path:
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folder, **options)
    return folder


def save_llama(folder: Path) -> Path:
    """float32, in several shards."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    return save_random(model, folder, max_shard_size="150KB")


def save_gpt2(folder: Path) -> Path:
    """bfloat16; its matrices are `Conv1D`, [in, out]."""
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2"), dtype=torch.bfloat16)
    return save_random(model, folder)


def save_bare_bloom(folder: Path) -> Path:
    """float16 and without the head: keys lack `transformer.`."""
    model = AutoModelForCausalLM.from_config(tiny_config("bloom"), dtype=torch.float16)
    save_random(model.transformer, folder)
    assert "h.0.self_attention.dense.weight" in load_file(folder / "model.safetensors")
    return folder


def save_mixtral(folder: Path) -> Path:
    """Old names: experts one by one, `block_sparse_moe`."""
    config = family_config("mixtral", hidden_size=64, intermediate_size=128, head_dim=16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_random(model, folder)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert name in load_file(folder / "model.safetensors")
    return folder


def save_hrm(folder: Path) -> Path:
    """Gate, query, key and value are one tensor in the file and four layers in the model."""
    config = AutoConfig.for_model(
        "hrm_text", vocab_size=96, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=4, num_hidden_layers=2, num_layers_per_stack=1,
        max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_random(model, folder)
    name = "model.H_module.layers.0.attn.gqkv_proj.weight"
    assert name in load_file(folder / "model.safetensors")
    return folder


def expanded_by_table(weight: torch.Tensor, kind: str, nested: bool) -> torch.Tensor:
    """The whole tensor through bitsandbytes, its codes looked up in its own table by hand."""
    every = torch.arange(16, dtype=torch.uint8)
    one = functional.QuantState(
        absmax=torch.ones(1), shape=(1, 32), dtype=torch.float32, blocksize=64, quant_type=kind
    )
    table = functional.dequantize_4bit(((every << 4) | every).reshape(-1, 1), one).reshape(-1)[::2]
    packed, state = functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested, blocksize=64
    )
    scale = state.absmax
    if nested:
        scale = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    flat = packed.reshape(-1)
    index = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1).long()[: weight.numel()]
    values = table[index] * scale.repeat_interleave(64)[: weight.numel()]
    return values.to(weight.dtype).reshape(weight.shape)
