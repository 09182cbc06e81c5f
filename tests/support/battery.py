"""Tiny models of many architectures, and a count of what a loaded model really holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

_COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 10,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_OLD = {key: _COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}

# Every rounding of the formulas is met: widths that are no multiples of 64, weights of an odd
# number of elements (mistral), and one of exactly 256 blocks of 64 (bloom).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_COMMON, "intermediate_size": 71, "attention_bias": True}),
    "llama_tied": ("llama", {**_COMMON, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_COMMON, "hidden_size": 80, "head_dim": 20}),
    "qwen3": ("qwen3", _COMMON),
    "mistral": ("mistral", {**_COMMON, "intermediate_size": 33, "hidden_size": 45}),
    "gemma3": ("gemma3_text", {**_COMMON, "tie_word_embeddings": True, "sliding_window": 8}),
    "phi3": ("phi3", {**_COMMON, "head_dim": 12, "original_max_position_embeddings": 64}),
    "gpt2": ("gpt2", {**_OLD, "n_embd": 36, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "bloom": ("bloom", {**_OLD, "hidden_size": 128, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "falcon",
        {**_OLD, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "gpt_neox": (
        "gpt_neox",
        {**_OLD, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**_COMMON, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 22},
    ),
    "mixtral": ("mixtral", {**_COMMON, "num_local_experts": 3, "head_dim": 12}),
    "opt": (
        "opt",
        {**_OLD, "hidden_size": 48, "ffn_dim": 70, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 40,
         "pad_token_id": 0},
    ),
}  # fmt: skip


# Classes that keep some weights in float32, in a 16-bit model too.
KEPT_FLOAT: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": (
        "glm4_moe",
        {**_COMMON, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 22,
         "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "gpt_oss": ("gpt_oss", {**_COMMON, "num_local_experts": 3, "sliding_window": 8}),
}  # fmt: skip


def battery_config(name: str) -> Any:
    """Returns the config of an architecture."""
    from transformers import AutoConfig

    kind, options = {**ARCHITECTURES, **KEPT_FLOAT}[name]
    return AutoConfig.for_model(kind, **options)


def save_battery_model(name: str, folder: Path) -> Path:
    """Writes a random model to a folder, in float32, and returns the folder."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(battery_config(name))
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.1)
    model.save_pretrained(folder / name)
    return folder / name


def real_load(
    folder: Path, bits: int, options: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Loads a model on the CPU with transformers alone, as its documentation says."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from glasstune.models.quiet import quiet_transformers

    loading: dict[str, Any] = {"dtype": dtype}
    if bits != 16:
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **options)
        loading |= {"quantization_config": config, "device_map": {"": "cpu"}}
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, **loading)


def held_tensors(module: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Returns every tensor that a module itself holds, by part; packed weights opened."""
    held: dict[str, list[torch.Tensor]] = {}

    def add(part: str, *tensors: Any) -> None:
        held.setdefault(part, []).extend(value for value in tensors if value is not None)

    for name, value in module._parameters.items():
        if value is None:
            continue
        state = getattr(value, "quant_state", None)
        add("bias" if name == "bias" else "weights", value.data)
        if state is not None:
            add("scales", state.absmax, state.offset)
            add("code", state.code)
            if state.state2 is not None:
                add("scales", state.state2.absmax)
                add("code", state.state2.code)
        add("scales", getattr(value, "SCB", None))
    for name, value in module._buffers.items():
        ours = type(module).__name__ == "Int8Linear" and name == "scale"
        add("scales" if ours else "buffers", value)
    return held


def real_tree(model: nn.Module) -> dict[str, tuple[str, dict[str, int]]]:
    """Returns class and bytes by part of every module, counted from storages, each once."""
    seen: set[int] = set()
    tree: dict[str, tuple[str, dict[str, int]]] = {}
    for path, module in model.named_modules():
        parts: Counter[str] = Counter()
        for part, tensors in held_tensors(module).items():
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    parts[part] += storage.nbytes()
        tree[path] = (type(module).__name__, {key: parts[key] for key in parts if parts[key]})
    return tree
