"""Everything that touches bitsandbytes: its config, its 4-bit layers on a CPU, its optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.core.names import check_names
from glasstune.kernels.expand.reference import expand_4bit_reference
from glasstune.kernels.int8_linear import Int8Linear

BLOCK_4BIT = 64
"""Weights that share a scale at 4 bit: bitsandbytes' default, which transformers keeps."""

_LLM_INT8_ONLY = ("llm_int8_threshold", "llm_int8_has_fp16_weight")
_WHERE = "model.quantization"


def bnb_config(config: ModelConfig, compute_dtype: torch.dtype, choices: Choices) -> Any | None:
    """Makes transformers' `BitsAndBytesConfig` from `model.bits` and `model.quantization`.

    Defaults at 4 bit: NF4, double quantisation, products in the model's dtype.

    Args:
        config: The model's part of the configuration.
        compute_dtype: dtype of the products.
        choices: Where what was decided is noted.

    Returns:
        The config, or None at 16 bit and for the 8-bit base of our own (w8a16).

    Raises:
        InputError: `unknown_key`, `contradiction` or `bad_value` in `model.quantization`.
    """
    from transformers import BitsAndBytesConfig

    options = dict(config.quantization)
    check_quantization_keys(options)
    _check_bits(options, config.bits)
    if config.bits == 16 or int8_compute(config, choices) == "w8a16":
        return None
    if config.bits == 4:
        for key, value, reason in (
            ("bnb_4bit_quant_type", "nf4", "NF4 fits normally distributed weights"),
            ("bnb_4bit_use_double_quant", True, "double quantisation saves 0.37 bit a weight"),
            ("bnb_4bit_compute_dtype", compute_dtype, "products in the model's own type"),
        ):
            if key not in options:
                options[key] = value
                said = value if isinstance(value, bool) else str(value).removeprefix("torch.")
                choices.record(f"{_WHERE}.{key}", said, reason)
    if isinstance(options.get("llm_int8_threshold"), int):
        options["llm_int8_threshold"] = float(options["llm_int8_threshold"])
    options["load_in_4bit"] = config.bits == 4
    options["load_in_8bit"] = config.bits == 8
    if options.get("bnb_4bit_quant_type", "nf4") not in ("nf4", "fp4"):
        raise InputError(
            "bad_value",
            f"bnb_4bit_quant_type is {options['bnb_4bit_quant_type']!r}",
            where=_WHERE,
            fix="use nf4 or fp4",
        )
    try:
        return BitsAndBytesConfig(**options)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "bad_value", str(error), where=_WHERE, fix="see transformers' BitsAndBytesConfig"
        ) from error


def quantization_keys() -> list[str]:
    """Returns the option names of `BitsAndBytesConfig`."""
    from transformers import BitsAndBytesConfig

    parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters
    return [name for name in parameters if name not in ("self", "kwargs")]


def check_quantization_keys(options: Mapping[str, Any]) -> None:
    """Refuses an option that `BitsAndBytesConfig` does not have.

    Raises:
        InputError: `unknown_key`, with the nearest name.
    """
    check_names(
        options,
        quantization_keys(),
        code="unknown_key",
        owner="BitsAndBytesConfig",
        where=_WHERE,
    )


def _check_bits(options: Mapping[str, Any], bits: int) -> None:
    for key, means in (("load_in_8bit", 8), ("load_in_4bit", 4)):
        if key in options and bool(options[key]) != (bits == means):
            raise InputError(
                "contradiction",
                f"{key} is {options[key]} but model.bits is {bits}",
                where=f"{_WHERE}.{key}",
                fix=f"set model.bits={means if options[key] else bits} and leave {key} out",
            )
    for key in options:
        needs = 4 if key.startswith("bnb_4bit_") else 8 if key in _LLM_INT8_ONLY else None
        if needs is not None and bits != needs:
            raise InputError(
                "contradiction",
                f"{key} is for a {needs}-bit base but model.bits is {bits}",
                where=f"{_WHERE}.{key}",
                fix=f"set model.bits={needs}, or leave {key} out",
            )


def int8_compute(config: ModelConfig, choices: Choices) -> str:
    """Returns how an 8-bit base multiplies, `w8a16` or `llm_int8`; other bits give `""`."""
    if config.bits != 8:
        return ""
    asked = [key for key in _LLM_INT8_ONLY if key in config.quantization]
    if asked and config.int8_compute != "llm_int8":
        choices.record("model.int8_compute", "llm_int8", f"{asked[0]} is set")
        return "llm_int8"
    return config.int8_compute


def guard_cpu_4bit(model: nn.Module) -> int:
    """Forbids bitsandbytes to repack 4-bit weights on a CPU with avx512_bf16.

    There `Linear4bit` turns its weight in place into a format of its inference kernel at the first
    forward outside training whose input needs no gradient. That kernel has no backward, and the
    weight read back is another: one evaluation would ruin all training after it.

    Args:
        model: Any model; layers that are not `Linear4bit` are left alone.

    Returns:
        How many layers were guarded.
    """
    import bitsandbytes

    count = 0
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            count += 1
    return count


def misread_widths(
    widths: Iterable[int], dtype: torch.dtype, *, quant_type: str = "nf4"
) -> list[int]:
    """Returns the row widths that bitsandbytes reads back wrong from 4 bit on this CPU.

    Seen in 0.50.2 with AVX-512: rows that are a multiple of 16 but not of 64 get the scales of
    other blocks. On CUDA they are read right. Eight rows of each width are tried, and compared
    with code times scale.

    Args:
        widths: Weights of a row.
        dtype: Of the weight that is read back.
        quant_type: `nf4` or `fp4`.
    """
    from bitsandbytes import functional

    wrong = []
    for width in sorted(set(widths)):
        # Whole blocks a row are never wrong; odd rows go through another function of theirs,
        # right but compiled at its first call.
        if width % BLOCK_4BIT == 0 or width % 2:
            continue
        # Neighbouring blocks differ by a factor of two or more, so another's scale is seen.
        places = torch.arange(8 * width)
        scales = 2.0 ** (places // BLOCK_4BIT * 7 % 11)
        probe = (torch.cos(places.float()) * scales).to(dtype).view(8, width)
        packed, state = functional.quantize_4bit(probe, blocksize=BLOCK_4BIT, quant_type=quant_type)
        right = torch.empty(8, width)
        expand_4bit_reference(packed, state.absmax, state.code, BLOCK_4BIT, right)
        theirs = functional.dequantize_4bit(packed, state).float()
        if not torch.allclose(theirs, right, rtol=0.01, atol=1e-6):
            wrong.append(width)
    return wrong


def misread_layers(model: nn.Module) -> dict[str, int]:
    """Returns path to row width of the 4-bit layers that this CPU reads wrong.

    Args:
        model: Any model; layers on another device are read right.
    """
    import bitsandbytes

    found: dict[tuple[torch.dtype, str], dict[str, int]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        state: Any = module.weight.quant_state
        if state is not None and module.weight.device.type == "cpu":
            kind = (state.dtype, str(state.quant_type))
            found.setdefault(kind, {})[path] = int(state.shape[-1])
    layers: dict[str, int] = {}
    for (dtype, quant_type), widths in found.items():
        wrong = misread_widths(widths.values(), dtype, quant_type=quant_type)
        layers |= {path: width for path, width in widths.items() if width in wrong}
    return layers


def adam_8bit(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Optimizer:
    """Makes bitsandbytes' AdamW with 8-bit moments; it runs on a CPU and on CUDA.

    Tensors below 4,096 values keep float32 moments. The state's dictionary goes through
    `torch.save` and back without loss, so a resumed run continues bit for bit.

    Args:
        parameters: float32 parameters.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay.

    Raises:
        InputError: `no_8bit_optimizer`: bitsandbytes has no native library on this machine.
    """
    import bitsandbytes
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        raise InputError(
            "no_8bit_optimizer",
            "bitsandbytes has no native library on this machine, which adamw_8bit needs",
            where="training.optim",
            fix="set training.optim=adamw_torch",
        )
    built: Optimizer = bitsandbytes.optim.AdamW8bit(
        list(parameters), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )
    return built


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer with 4- or 8-bit weights, bitsandbytes' or our own."""
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt, Int8Linear)
    return isinstance(module, kinds)


def is_packed_weight(parameter: torch.Tensor) -> bool:
    """Whether a tensor is one of bitsandbytes' packed weights, which have no ordinary dtype."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")
