"""Putting adapters onto a model, fresh or from a folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import Parameter

from glasstune.adapters.masters import make_masters_float32
from glasstune.adapters.options import (
    build_lora_config,
    check_asked,
    linear_names,
    peft_remarks_unsaid,
)
from glasstune.adapters.reading import fit_keys, read_adapter_file
from glasstune.adapters.state import adapter_state, restore_state
from glasstune.core.errors import InputError, RunError
from glasstune.core.findings import Finding
from glasstune.models.classes import PreTrainedModel
from glasstune.models.int8 import Int8Linear

_BASE_BIASES = "_glasstune_base_biases"


def add_adapter(model: PreTrainedModel, **options: Any) -> PeftModel:
    """Adds a LoRA adapter; everything trained is float32.

    Args:
        model: A plain transformers model at any precision.
        **options: `LoraConfig`'s fields; `target_modules` defaults to all-linear.

    Returns:
        A plain `peft.PeftModel` whose adapter is active and trainable. Seed torch before.

    Raises:
        InputError: An option that does not exist or does not suit the model.
    """
    return _inject(model, build_lora_config(options, model))


def start_from(
    model: PreTrainedModel, folder: Path | str, asked: Mapping[str, Any] | None = None
) -> PeftModel:
    """Adds a saved LoRA adapter and leaves it trainable.

    Args:
        model: The plain base model.
        folder: A folder in PEFT's format.
        asked: Options that the user gave beside the folder.

    Raises:
        InputError: No adapter there, not LoRA, an option that is not the saved adapter's, or its
            tensors do not fit the model: both lists of names are given.
    """
    folder = Path(folder)
    config = read_lora_config(folder)
    check_asked(asked or {}, config, model, folder)
    config.inference_mode = False
    config.base_model_name_or_path = None  # PEFT writes the name of the model at hand
    wrapped = _inject(model, config)
    tensors = read_adapter_file(folder)
    restore_state(wrapped, fit_keys(tensors, adapter_state(wrapped), folder))
    return wrapped


def load_adapter_for_inference(model: PreTrainedModel, folder: Path | str) -> PeftModel:
    """Adds a saved adapter frozen and in eval mode.

    Raises:
        InputError: As `start_from`.
    """
    wrapped = start_from(model, folder)
    wrapped.requires_grad_(False)
    wrapped.eval()
    return wrapped


def trainable(model: nn.Module) -> dict[str, Parameter]:
    """Returns name to parameter of all that is trained, in the model's order.

    Raises:
        RunError: `nothing_to_train`.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise RunError(
            "nothing_to_train",
            "no parameter of the model needs a gradient",
            where="adapter",
            fix="add an adapter, or load it as trainable (`adapters.start_from`)",
        )
    return found


def keep_activation_dtype(model: nn.Module) -> int:
    """Stops PEFT from copying activations to float32 for its float32 adapters.

    Call it where the forward runs under autocast, which casts the adapter to the products' type
    instead; without autocast the types would not fit.

    Returns:
        How many adapter layers were told.
    """
    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    return len(layers)


def adapter_fingerprint(model: PeftModel) -> str:
    """Returns the SHA-256 over the adapter's options and its tensors' names and shapes."""
    options = model.peft_config[model.active_adapter].to_dict()
    for name in ("base_model_name_or_path", "inference_mode", "revision", "peft_version"):
        options.pop(name, None)
    shapes = {name: list(tensor.shape) for name, tensor in adapter_state(model).items()}
    text = json.dumps([_plain(options), shapes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def adapter_findings(model: PeftModel) -> list[Finding]:
    """Returns what a user should know of an adapter that was accepted."""
    config = model.peft_config[model.active_adapter]
    causal = model.get_base_model()
    head, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
    tied = bool(getattr(causal.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    touched = [
        name
        for name, part in (("head", head), ("embedding", embedding))
        if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    tokens = getattr(config, "trainable_token_indices", None)
    if not (tied and touched) or tokens or getattr(config, "ensure_weight_tying", False):
        return []
    return [
        Finding(
            code="tied_weights_adapted",
            severity="warning",
            where="adapter",
            message=f"head and embedding share one weight, and the {touched[0]} alone is adapted: "
            "a merged model cannot keep them tied",
            fix=f"leave the {touched[0]} out, or set ensure_weight_tying=true",
        )
    ]


def base_biases(model: nn.Module) -> Mapping[Parameter, Tensor]:
    """Returns the base's own biases that are trained, parameter to the value before training."""
    biases: Mapping[Parameter, Tensor] = getattr(model, _BASE_BIASES, {})
    return biases


def _inject(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    own = {id(parameter) for parameter in model.parameters()}
    names = ", ".join(linear_names(model))  # before PEFT wraps some of them and fails
    try:
        with peft_remarks_unsaid():
            wrapped: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        raise InputError(
            "adapter_refused",
            f"PEFT refuses these options: {_one_line(error)}",
            where="adapter",
            fix=f"see PEFT's LoraConfig; linear modules of this model: {names}",
        ) from error
    except RuntimeError as error:
        if "can require gradients" not in str(error):
            raise
        raise InputError(
            "saved_module_quantized",
            "modules_to_save names a module that is stored at 4 or 8 bit, which cannot be trained",
            where="adapter.modules_to_save",
            fix="take it out (LoRA can adapt it), add it to "
            "model.quantization.llm_int8_skip_modules, or set model.bits=16",
        ) from error
    make_masters_float32(wrapped)
    _refuse_int8_merges(wrapped)
    biases = {
        parameter: parameter.detach().clone()
        for parameter in wrapped.parameters()
        if parameter.requires_grad and id(parameter) in own
    }
    setattr(wrapped, _BASE_BIASES, biases)
    return wrapped


def _one_line(error: Exception) -> str:
    """Returns what an error says without the modules or the C++ frames that it prints."""
    text = re.sub(r"\(\n.*?\n\)", "", str(error), flags=re.DOTALL)
    return " ".join(text.split("\nException raised from")[0].split())


def _refuse_int8_merges(model: nn.Module) -> None:
    """Makes a merge into int8 rows an error: PEFT's DoRA would write float values as int8."""

    def merge(*args: Any, **kwargs: Any) -> None:
        raise InputError(
            "merge_into_8_bit",
            "an adapter cannot be merged into an 8-bit base: its rows would be rounded again",
            where="model.bits",
            fix="load the base at 16 bit and merge there",
        )

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), Int8Linear):
            layer.merge = merge


def read_lora_config(folder: Path) -> LoraConfig:
    """Reads the options of a saved adapter.

    Raises:
        InputError: `no_adapter` or `bad_adapter`.
    """
    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            "no_adapter",
            "the folder has no adapter_config.json",
            where=str(folder),
            fix="give a folder that holds a PEFT adapter (a run's adapter/ folder)",
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            "bad_adapter",
            f"adapter_config.json cannot be read: {error}",
            where=str(folder),
            fix="repair the file, or train with the installed PEFT's options",
        ) from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise InputError(
            "bad_adapter",
            f"the adapter is of type {kind}, not LoRA",
            where=str(folder),
            fix="give a LoRA adapter",
        )
    return config


def _plain(value: Any) -> Any:
    """Turns sets into sorted lists, so that the same options give the same text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
