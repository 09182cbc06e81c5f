"""Loading a base model at 16, 8 or 4 bit: frozen, in eval mode, without a cache."""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from glasstune.core.choices import WARNING, Choices
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.models.families.table import family_of
from glasstune.models.hub import hub_errors_explained
from glasstune.models.int8 import convert_to_int8
from glasstune.models.quantization import (
    bnb_config,
    guard_cpu_4bit,
    is_packed_weight,
    is_quantized,
    misread_layers,
)
from glasstune.models.quiet import quiet_transformers
from glasstune.models.resolve import ResolvedModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base(
    config: ModelConfig, resolved: ResolvedModel, *, choices: Choices, on_host: bool = False
) -> PreTrainedModel:
    """Loads the base model that a config describes.

    Args:
        config: The model's part of the configuration.
        resolved: What `resolve_model` found.
        choices: Where every automatic decision is noted.
        on_host: Leaves the weights in the host's memory, whatever the device; not at 4 bit or
            LLM.int8, which are packed on the device.

    Returns:
        A plain transformers model: no parameter needs a gradient, eval mode, `use_cache` off.

    Raises:
        InputError: No GPU where one is asked for, a contradiction in the quantisation, weights
            missing, damaged or not readable safely.
    """
    device = choose_device(config.device, choices)
    dtype = _DTYPES[config.dtype]
    compute = _compute_dtype(dtype, device, choices)
    own = getattr(resolved.config, "quantization_config", None)
    quantization = None if own is not None else bnb_config(config, compute, choices)
    if own is not None:
        _say_own_quantization(own, config, choices)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": _attention(config, resolved, choices),
        "trust_remote_code": resolved.trust_remote_code,
    }
    if quantization is not None:
        options["quantization_config"] = quantization
    ours = own is None and config.bits == 8 and quantization is None
    if (device.type != "cpu" and not ours and not on_host) or quantization is not None:
        options["device_map"] = {"": str(device)}
    model = _read(resolved, options)
    if ours:
        convert_to_int8(model, config.quantization.get("llm_int8_skip_modules"))
        if not on_host:
            model.to(device)
    if own is None and config.bits != 16:
        _say_converted(model, config, choices)
    if compute != dtype:
        _cast_floats(model, dtype, compute)
    if guard_cpu_4bit(model):
        _say_misread(model, choices)
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    return model


def choose_device(asked: str, choices: Choices) -> torch.device:
    """Returns the device of `model.device`.

    Raises:
        InputError: `no_gpu`: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise InputError(
            "no_gpu",
            "model.device is cuda but torch sees no CUDA device",
            where="model.device",
            fix="set model.device=cpu, or install a CUDA build of torch and a driver",
        )
    if asked == "auto":
        name = "cuda" if available else "cpu"
        reason = "a CUDA device is there" if available else "torch sees no CUDA device"
        choices.record("model.device", name, reason)
    else:
        name = asked
    return (
        torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
    )


def autocast_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """Returns the type that training's products should be autocast to, None for float32.

    float16 weights are multiplied in bfloat16 where the device has it: its range is float32's, so
    no loss scaling is needed. Where it does not, `load_base` has widened them to float32.
    """
    dtype: torch.dtype = model.dtype
    if dtype == torch.float32:
        return None
    return torch.bfloat16


def _compute_dtype(dtype: torch.dtype, device: torch.device, choices: Choices) -> torch.dtype:
    if dtype != torch.float16 or (device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return dtype
    choices.record(
        "model.compute_dtype",
        "float32",
        "float16 products overflow at 65,504 and are slow on a CPU: weights are rounded to "
        "float16 and multiplied in float32",
    )
    return torch.float32


def _attention(config: ModelConfig, resolved: ResolvedModel, choices: Choices) -> str | None:
    if config.attn_implementation is not None:
        return config.attn_implementation
    family = family_of(resolved.config)
    if family is not None and family.attention is not None:
        reason = f"{resolved.config.model_type} computes a soft cap or sinks that sdpa does not"
        choices.record("model.attn_implementation", family.attention, reason)
        return family.attention
    return None


def _say_own_quantization(own: Any, config: ModelConfig, choices: Choices) -> None:
    content = own if isinstance(own, dict) else own.to_dict()
    method = content.get("quant_method", "unknown")
    choices.record(
        "model.quantization",
        str(getattr(method, "value", method)),
        f"the checkpoint is quantised already; its own settings win over model.bits={config.bits}",
    )


def _say_converted(model: PreTrainedModel, config: ModelConfig, choices: Choices) -> None:
    """Notes how many layers a 4- or 8-bit load converted; none at all is an error."""
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    small = [name for name in linear if is_quantized(model.get_submodule(name))]
    if not small:
        raise InputError(
            "nothing_quantized",
            f"none of the {len(linear)} linear layers of {model.config.model_type} could be stored "
            f"at {config.bits} bit: only modules of exactly nn.Linear or Conv1D are, outside the "
            "skip list and not offloaded",
            where="model.bits",
            fix="set model.bits=16, or change model.quantization",
        )
    if any(type(model.get_submodule(name)).__name__ == "Linear8bitLt" for name in small):
        reason = "LLM.int8 casts activations to float16, rounds them to int8 and splits outliers"
        choices.record("model.compute_dtype", "int8", reason)
    choices.record(
        "model.quantized_layers",
        len(small),
        f"stored at {config.bits} bit: exactly nn.Linear or Conv1D; the head, what is tied and the "
        "skip list stay",
    )


def _say_misread(model: PreTrainedModel, choices: Choices) -> None:
    """Warns of 4-bit layers that run with other weights on this CPU than on a GPU."""
    layers = misread_layers(model)
    if not layers:
        return
    widths = ", ".join(f"{width:,}" for width in sorted(set(layers.values())))
    choices.record(
        "model.misread_4bit_layers",
        len(layers),
        f"{WARNING}bitsandbytes reads 4-bit rows of {widths} weights back wrong on this CPU "
        f"({next(iter(layers))} and others): what is trained or answered here is not the model "
        "that a GPU runs; set model.bits=8 or 16, or use a GPU",
    )


def _read(resolved: ResolvedModel, options: dict[str, Any]) -> PreTrainedModel:
    where = f"model.path={resolved.path}"
    try:
        with hub_errors_explained(resolved.folder_or_id), quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                resolved.folder_or_id, output_loading_info=True, **options
            )
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            "missing_package",
            str(error).strip().splitlines()[0],
            where=where,
            fix="install the package that the message names",
        ) from error
    except Exception as error:
        if not _is_users(error):
            raise
        text = str(error).strip().splitlines()
        raise InputError(
            "cannot_load",
            text[0] if text else type(error).__name__,
            where=where,
            fix="check that the folder holds weights as safetensors (or .bin without pickled code) "
            "and that model.attn_implementation and model.quantization suit the architecture",
        ) from error
    _check_complete(report, where)
    loaded: PreTrainedModel = model
    return loaded


def _is_users(error: Exception) -> bool:
    """Whether an exception of a load speaks of the checkpoint or an option, not of a bug."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    kinds = (OSError, ValueError, RuntimeError, UnpicklingError)
    return isinstance(error, kinds) or type(error).__name__ == "SafetensorError"


def _check_complete(report: Any, where: str) -> None:
    """Refuses a checkpoint that left weights at random; transformers only logs them."""
    for kind, says in (
        ("missing_keys", "has no value for"),
        ("mismatched_keys", "has another shape for"),
    ):
        names = sorted(str(name) for name in report.get(kind, ()))
        if names:
            raise InputError(
                "weights_missing",
                f"the checkpoint {says} {len(names)} weights of its model: {', '.join(names[:5])}",
                where=where,
                fix="download the checkpoint again; its config.json and its weights do not fit",
            )


def _cast_floats(model: PreTrainedModel, source: torch.dtype, target: torch.dtype) -> None:
    """Casts what is not packed: `model.to` refuses quantised models."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == source and not is_packed_weight(tensor):
            tensor.data = tensor.data.to(target)
