"""Adapters of every kind on tiny models, and what plain PEFT and transformers make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS = [[5, 6, 7, 8, 9, 60], [11, 3, 7], [3, 90, 17, 2] * 4]
"""Token ids that every tiny model here can read."""

# E, H and L stand for the embedding, the head and a linear layer of the family.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 4},
    "dora": {"use_dora": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "head_saved": {"modules_to_save": ["H"]},
    "embedding_saved": {"modules_to_save": ["E"]},
    "norm_saved": {"modules_to_save": ["N"]},
    "embedding": {"target_modules": ["E", "L"]},
    "embedding_dora": {"target_modules": ["E"], "use_dora": True},
    "head": {"target_modules": ["H", "L"]},
    "tokens": {"trainable_token_indices": [3, 7]},
    "mixed": {"rank_pattern": {"L": 2}, "alpha_pattern": {"L": 5}},
    "pattern_rslora": {"rank_pattern": {"L": 5}, "use_rslora": True},
    "few_layers": {"target_modules": ["L"], "layers_to_transform": [1]},
    "experts": {
        "target_modules": ["L"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}  # fmt: skip

_NAMES = {
    "gpt2": {"E": "wte", "L": "c_attn", "N": "ln_f"},
    "bloom": {"E": "word_embeddings", "L": "query_key_value", "N": "ln_f"},
    "falcon": {"E": "word_embeddings", "L": "query_key_value", "N": "ln_f"},
    "gpt_neox": {
        "E": "embed_in", "H": "embed_out", "L": "query_key_value", "N": "final_layer_norm",
    },
    "opt": {"L": "q_proj", "N": "final_layer_norm"},
    "phi3": {"L": "qkv_proj"},
}  # fmt: skip
NO_BIAS = ("llama_tied", "mistral", "gemma3", "phi3", "qwen3", "qwen3_moe", "mixtral", "gpt_neox")


def method_options(family: str, method: str) -> dict[str, Any]:
    """Returns `LoraConfig`'s options of a method with a family's names in them."""
    names = {"E": "embed_tokens", "H": "lm_head", "L": "q_proj", "N": "norm"}
    names |= _NAMES.get(family, {})

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {names.get(key, key): item for key, item in value.items()}
        if isinstance(value, list):
            return [names.get(item, item) if isinstance(item, str) else item for item in value]
        return value

    chosen = {key: named(value) for key, value in METHODS[method].items()}
    options = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if family in ("mixtral", "qwen3_moe") and method != "experts":
        options["target_modules"] = ["q_proj", "v_proj"]  # PEFT's all-linear takes experts too
    return {**options, **chosen}


def load_plain(folder: Path | str, **options: Any) -> Any:
    """Loads a model with transformers alone, in float32 unless told otherwise."""
    from transformers import AutoModelForCausalLM

    from glasstune.models.quiet import quiet_transformers

    options = {"dtype": torch.float32, "experts_implementation": "eager", **options}
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def adapted(base: Path | Any, options: dict[str, Any], seed: int = 0, scale: float = 0.1) -> Any:
    """Puts an adapter whose every tensor is away from its start onto a base, by plain PEFT."""
    import warnings

    from peft import LoraConfig, get_peft_model

    model = load_plain(base) if isinstance(base, (Path, str)) else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.dtype))
    return wrapped.eval()


def save_peft(wrapped: Any, folder: Path, **options: Any) -> Path:
    """Saves an adapter with PEFT itself."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder, **options)
    return folder


def logits_of(model: Any, rows: list[list[int]] = ROWS) -> Tensor:
    """Returns float32 logits of all rows' tokens, each row run alone."""
    with torch.no_grad():
        found = [model(torch.tensor([row])).logits[0].float() for row in rows]
    return torch.cat(found)


def peft_merged(wrapped: Any) -> Any:
    """Merges with PEFT, in the type that the base has."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wrapped.merge_and_unload(safe_merge=True)


def stored(folder: Path) -> dict[str, Tensor]:
    """Reads all safetensors files of a folder with the library itself."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def rename_keys(adapter: Path, to: Path, rename: Any) -> Path:
    """Copies an adapter with its tensors under other names."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, to)
    file = to / "adapter_model.safetensors"
    save_file({rename(key): value for key, value in load_file(file).items()}, file)
    return to


def edit_json(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    file.write_text(json.dumps(content), encoding="utf-8")
