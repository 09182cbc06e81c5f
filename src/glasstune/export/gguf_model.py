"""The model's side of a GGUF file: hyperparameters, and what becomes of each tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, RopeScalingType

from glasstune.core.errors import InputError
from glasstune.core.tensors import StoredTensor, stored_tensors

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
}
"""`model_type` to GGUF's architecture: Mistral is Llama there."""

_PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")
_DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Buffers of old checkpoints that follow from the config."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file.

    Args:
        name: GGUF's name.
        stored: Where it is read.
        paired: Whether the rows of each head change their order, see `pair_rows`.
    """

    name: str
    stored: StoredTensor
    paired: bool = False


def architecture(config: Any, where: str) -> gguf.MODEL_ARCH:
    """Returns GGUF's architecture of a config.

    Raises:
        InputError: `unsupported_family`, or a setting that llama.cpp computes otherwise.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise InputError(
            "unsupported_family",
            f"no GGUF is written for the family {kind}",
            where=where,
            fix="leave --gguf out; supported: " + ", ".join(ARCHITECTURES),
        )
    rope = config.rope_parameters
    refused = {
        "hidden_act": config.hidden_act if config.hidden_act not in ("silu", "swish") else None,
        "quantization_config": "weights that are not plain"
        if getattr(config, "quantization_config", None)
        else None,
        "partial_rotary_factor": rope["partial_rotary_factor"]
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0)
        else None,
        "rope_type": rope["rope_type"]
        if rope["rope_type"] not in ("default", "linear", "yarn", "llama3")
        else None,
        "truncate": False if rope.get("truncate") is False else None,
    }
    for key, value in refused.items():
        if value is not None:
            raise InputError(
                "unsupported_config",
                f"{key} is {value!r}: llama.cpp does not compute this model",
                where=where,
                fix="leave --gguf out",
            )
    return ARCHITECTURES[kind]


def add_hyperparameters(writer: GGUFWriter, config: Any) -> list[str]:
    """Writes the hyperparameters; returns notes on what a reader does otherwise."""
    head = head_size(config)
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(int(config.num_attention_heads))
    writer.add_head_count_kv(kv_heads(config))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(int(config.vocab_size))
    writer.add_rope_dimension_count(head)
    _add_rope(writer, config)
    window = getattr(config, "sliding_window", None)
    if config.model_type == "qwen2" and not getattr(config, "use_sliding_window", False):
        window = None
    if window is not None and window < config.max_position_embeddings:
        return [
            f"GGUF: llama.cpp attends to all positions, the model to the last {window:,} only; "
            "longer texts come out otherwise"
        ]
    return []


def _add_rope(writer: GGUFWriter, config: Any) -> None:
    rope: Mapping[str, Any] = config.rope_parameters
    kind, factor = rope["rope_type"], rope.get("factor")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind in ("default", "llama3"):  # llama3's rule is a tensor, see `rope_factors`
        return
    writer.add_rope_scaling_type(
        RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN
    )
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "linear":
        writer.add_rope_scaling_factor(float(rope["factor"]))
        return
    factor = float(factor or config.max_position_embeddings / original)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(int(original))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
    # llama.cpp scales by 0.1 ln(factor) + 1 on its own, and by this on top.
    writer.add_rope_scaling_attn_factors(_yarn_scale(rope, factor) / _mscale(factor, 1.0))


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    """Returns what transformers multiplies cosine and sine by (YaRN, section 3.4)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if one and all_dims:
        return _mscale(factor, float(one)) / _mscale(factor, float(all_dims))
    return _mscale(factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rope_factors(config: Any) -> list[float] | None:
    """Returns what each rotary frequency is divided by under Llama 3.1's rule; None for others.

    Wavelengths below the high limit stay, those above the low limit are stretched by `factor`,
    between them the inverse goes over linearly in the number of turns.
    """
    rope: Mapping[str, Any] = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    size = head_size(config)
    divisors = []
    for index in range(0, size, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (index / size)
        turns = context / wavelength
        if turns > high:
            divisors.append(1.0)
        elif turns < low:
            divisors.append(factor)
        else:
            blend = (turns - low) / (high - low)
            divisors.append(1.0 / ((1.0 - blend) / factor + blend))
    return divisors


def head_size(config: Any) -> int:
    """Returns the width of one head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def kv_heads(config: Any) -> int:
    """Returns the number of key and value heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def plan_tensors(folder: Path, config: Any, arch: gguf.MODEL_ARCH) -> list[PlannedTensor]:
    """Maps a folder's tensors to GGUF's, in the order of the model.

    Args:
        folder: With safetensors.
        config: Its config.
        arch: GGUF's architecture.

    Raises:
        InputError: A tensor is missing, unknown, or of a type that is no plain weight.
    """
    stored = folder_tensors(folder)
    names = gguf.get_tensor_name_map(arch, int(config.num_hidden_layers))
    plan: list[PlannedTensor] = []
    unknown: list[str] = []
    for name, tensor in stored.items():
        if name.endswith(_DERIVED):
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # transformers ties it whatever the file holds
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None or tensor.dtype not in ("BF16", "F16", "F32", "F64"):
            unknown.append(f"{name} ({tensor.dtype})")
            continue
        plan.append(PlannedTensor(mapped, tensor, _paired(name, arch)))
    if unknown:
        raise InputError(
            "unknown_tensors",
            f"{len(unknown)} tensors have no place in a GGUF file of this family: "
            + ", ".join(sorted(unknown)[:4]),
            where=str(folder),
            fix="leave --gguf out, or merge into a 16- or 32-bit copy of the base",
        )
    _check_complete(folder, config, names, {tensor.name for tensor in plan})
    plan.sort(key=lambda tensor: _order(tensor.name))
    return plan


def _paired(name: str, arch: gguf.MODEL_ARCH) -> bool:
    """Llama's rotary pairs are neighbours in GGUF, half a head apart in transformers."""
    module = name.rpartition(".")[0]
    return arch is gguf.MODEL_ARCH.LLAMA and module.endswith(_PERMUTED)


def _check_complete(folder: Path, config: Any, names: Any, found: set[str]) -> None:
    parts = ["model.embed_tokens", "model.norm"]
    if not config.tie_word_embeddings:
        parts.append("lm_head")
    for layer in range(int(config.num_hidden_layers)):
        block = f"model.layers.{layer}."
        parts += [f"{block}self_attn.{name}_proj" for name in "qkvo"]
        parts += [f"{block}mlp.{name}_proj" for name in ("gate", "up", "down")]
        parts += [f"{block}input_layernorm", f"{block}post_attention_layernorm"]
    missing = [part for part in parts if f"{names.get_name(part)}.weight" not in found]
    if missing:
        raise InputError(
            "missing_tensors",
            f"{len(missing)} tensors of the model are not in the folder: "
            + ", ".join(f"{name}.weight" for name in missing[:4]),
            where=str(folder),
            fix="save the model again",
        )


def _order(name: str) -> tuple[int, int, str]:
    """Embedding, blocks by number, then the rest."""
    if name.startswith("token_embd"):
        return (0, 0, name)
    if name.startswith("blk."):
        return (1, int(name.split(".")[1]), name)
    return (2, 0, name)


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Finds every tensor of a folder's safetensors files, through their index where there is one.

    Raises:
        InputError: There are none, or the index names a file or tensor that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weights: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / name for name in sorted(set(weights.values()))}
        missing = [name for name, path in files.items() if not path.is_file()]
        if missing:
            raise InputError(
                "missing_shards", f"the index names {missing[0]}, which is not there",
                where=str(index), fix="copy the folder again",
            )  # fmt: skip
        shards = {name: stored_tensors(path) for name, path in files.items()}
        lost = [name for name, file in weights.items() if name not in shards[file]]
        if lost:
            raise InputError(
                "missing_tensors", f"{weights[lost[0]]} does not hold {lost[0]}",
                where=str(index), fix="copy the folder again",
            )  # fmt: skip
        return {name: shards[file][name] for name, file in weights.items()}
    single = folder / "model.safetensors"
    if single.is_file():
        return stored_tensors(single)
    raise InputError(
        "no_weights", "the folder has no model.safetensors and no index", where=str(folder),
        fix="give a folder that save_pretrained or glasstune merge wrote",
    )  # fmt: skip
