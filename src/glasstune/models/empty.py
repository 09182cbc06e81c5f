"""A base model without weights, and the local folder that its weights are read from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from glasstune.core.errors import InputError
from glasstune.models.families.table import family_of
from glasstune.models.hub import hub_errors_explained
from glasstune.models.inspect.source import own_quantization, quantization_method
from glasstune.models.quiet import quiet_transformers
from glasstune.models.resolve import ResolvedModel

_BESIDE = ("*.json", "*.py", "*.model", "*.txt", "*.jinja")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def local_folder(resolved: ResolvedModel) -> Path:
    """Returns the folder that holds a base's weights; of a hub id, its snapshot in the cache.

    Raises:
        InputError: The hub refuses or cannot be reached, or the model is not in the cache.
    """
    if resolved.kind != "hub":
        return Path(resolved.folder_or_id)
    with hub_errors_explained(resolved.folder_or_id):
        for weights in _WEIGHTS:
            patterns = [*_BESIDE, weights]
            folder = Path(snapshot_download(resolved.folder_or_id, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
    return folder


def refuse_quantized(config: PreTrainedConfig, where: str) -> None:
    """Refuses a base whose stored weights are quantised: there is no original to add to.

    Raises:
        InputError: `base_quantized`.
    """
    own = own_quantization(config)
    if own is None:
        return
    raise InputError(
        "base_quantized",
        f"the base's own weights are stored quantised ({quantization_method(own)}): there is no "
        "16-bit original in it to merge into",
        where=where,
        fix="give the original checkpoint with --base",
    )


def empty_model(
    config: PreTrainedConfig, *, trust_remote_code: bool = False, untied: bool = False
) -> PreTrainedModel:
    """Builds a model on the meta device; only buffers that no checkpoint stores are real.

    Args:
        config: Of the base; not changed.
        trust_remote_code: Whether code of the checkpoint may run.
        untied: Leaves head and embedding apart, whatever the config says.

    Returns:
        The frozen model in eval mode, float32 by name, `use_cache` off.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    # The grouped product wants widths of 16 bytes; the plain loop takes every mixture.
    config._experts_implementation = "eager"
    if untied:
        untie(config)
    family = family_of(config)
    options: dict[str, Any] = {}
    if family is not None and family.attention is not None:
        options["attn_implementation"] = family.attention
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
        )
    # Filling a weight with numbers turned each into one of its own; tied ones are one again.
    model.tie_weights()
    model.requires_grad_(False)
    model.eval()
    return model


def untie(config: Any) -> None:
    """Writes into a config that head and embedding are two weights."""
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False


def is_tied(config: Any) -> bool:
    """Whether a config says that head and embedding share one weight."""
    text = config.get_text_config(decoder=True)
    return bool(getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False)))


def float32_names(model: PreTrainedModel, names: list[str], dtype: torch.dtype) -> set[str]:
    """Returns the weights that the class keeps in float32 in a 16-bit model."""
    import re

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return set()
    pattern = re.compile("|".join(key.replace("*", ".*") for key in plan))
    return {name for name in names if pattern.search(name) is not None}
