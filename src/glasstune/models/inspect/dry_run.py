"""The model's skeleton on the meta device, converted as a real load would convert it.

Class by class the steps of `from_pretrained(..., quantization_config=...)`: build under the load
dtype without tying, let transformers' own quantiser replace layers, give float32 to what must stay
so, tie last. No weight exists at any point.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.models.inspect.config_check import first_line
from glasstune.models.inspect.live import live_bits, meta_view
from glasstune.models.inspect.source import ModelSource, own_quantization, quantization_method
from glasstune.models.int8 import empty_int8
from glasstune.models.quantization import (
    bnb_config,
    check_quantization_keys,
)
from glasstune.models.quantization import (
    int8_compute as chosen_int8_compute,
)
from glasstune.models.quiet import quiet_transformers
from glasstune.models.skips import SkipReason, eligible, skip_keys

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a precision means for one source.

    Args:
        bits: 16, 8 or 4.
        config: `BitsAndBytesConfig`, or None where none is applied.
        w8a16: Whether linear layers become our own `Int8Linear`.
        own: Whether the options are the checkpoint's own.
        skip: The user's `llm_int8_skip_modules`, None where transformers' default holds.
    """

    bits: int
    config: Any | None
    w8a16: bool
    own: bool
    skip: list[str] | None

    @property
    def quantizes(self) -> bool:
        """Whether layers are converted."""
        return self.config is not None or self.w8a16

    def options(self) -> dict[str, Any]:
        """Returns the applied options by `BitsAndBytesConfig`'s names, JSON values only."""
        if self.config is None:
            return {"int8_compute": "w8a16"} if self.w8a16 else {}
        content = self.config.to_diff_dict()
        content.pop("quant_method", None)
        for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
            if self.bits == 4:
                value = getattr(self.config, key)
                content[key] = str(value).removeprefix("torch.") if "dtype" in key else value
        return {key: value for key, value in content.items() if not key.startswith("_")}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device.

    Args:
        model: After the conversion.
        before: Its modules by path as they were before.
        keys: The skip keys that held, with their reasons; empty where nothing was converted.
    """

    model: nn.Module
    before: dict[str, nn.Module]
    keys: dict[str, SkipReason]


def skeleton(
    source: ModelSource,
    bits: int,
    quantization: Mapping[str, Any] = {},
    *,
    dtype: str = "bfloat16",
    int8_compute: str = "llm_int8",
) -> nn.Module:
    """Builds the model at a precision on the meta device; nothing is read or allocated.

    Weights keep their logical shapes, also the packed ones. Of a live module it is a copy of the
    base model's structure (adapters taken off, see `live.meta_view`); the module is not changed.

    Args:
        source: What `open_source` found.
        bits: 16, 8 or 4.
        quantization: Options of `BitsAndBytesConfig`; those of another precision are left out.
        dtype: Load dtype: `bfloat16`, `float16` or `float32`. A live module keeps its own.
        int8_compute: `llm_int8` (`Linear8bitLt`) or `w8a16` (our own `Int8Linear`).

    Returns:
        A frozen model; a transformers model where the source is one.

    Raises:
        InputError: Unknown or contradictory options, no causal language model of this kind, a
            config whose model cannot be built, a precision that the source does not have.
    """
    plan = make_plan(source, bits, quantization, dtype=dtype, int8_compute=int8_compute)
    return build(source, plan, dtype=dtype).model


def build(source: ModelSource, plan: Plan, *, dtype: str) -> Skeleton:
    """Builds the skeleton of a plan; see `skeleton` for the errors."""
    load = _dtype(dtype)
    with _quietly():
        if source.module is not None:
            return _from_module(source.module, plan)
        model = _empty_model(source, load)
        before = dict(model.named_modules())
        keys = skip_keys(model, plan.skip) if plan.quantizes else {}
        _convert(model, plan, load)
        _keep_float32(model, load)
        model.tie_weights(recompute_mapping=False)
        if plan.w8a16:
            _convert_w8a16(model, plan.skip)
    model.requires_grad_(False)
    model.eval()
    return Skeleton(model, before, keys)


def make_plan(
    source: ModelSource,
    bits: int,
    quantization: Mapping[str, Any],
    *,
    dtype: str,
    int8_compute: str,
) -> Plan:
    """Decides which options apply; see `skeleton` for arguments and errors."""
    check_quantization_keys(quantization)
    _check_bits(source, bits)
    own = own_bnb(source)
    if own is not None:
        config = AutoHfQuantizer.from_config(dict(own)).quantization_config
        return Plan(bits, config, False, True, _skip_list(config))
    if bits == 16:
        return Plan(16, None, False, False, None)
    if source.module is not None and live_bits(source.module) != 16:
        return Plan(bits, None, False, True, None)
    options = options_for(bits, quantization)
    model = ModelConfig(
        path=source.name,
        bits=bits,
        quantization=options,
        int8_compute=int8_compute,
    )
    with _quietly():
        config = bnb_config(model, _dtype(dtype), Choices())
    w8a16 = chosen_int8_compute(model, Choices()) == "w8a16"
    skip = options.get("llm_int8_skip_modules") if config is None else _skip_list(config)
    _check_skip(skip)
    return Plan(bits, config, w8a16, False, None if skip is None else list(skip))


def options_for(bits: int, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that concern a precision: one mapping serves all three."""
    others = {
        16: ("bnb_4bit_", "llm_int8_", "load_in_"),
        8: ("bnb_4bit_", "load_in_"),
        4: ("llm_int8_threshold", "llm_int8_has_fp16_weight", "load_in_"),
    }[bits]
    return {key: value for key, value in quantization.items() if not key.startswith(others)}


def own_bnb(source: ModelSource) -> dict[str, Any] | None:
    """Returns a checkpoint's own bitsandbytes settings, None where it has none."""
    if source.module is not None:
        return None
    own = own_quantization(source.config)
    return own if own is not None and quantization_method(own) == "bitsandbytes" else None


def own_bits(source: ModelSource) -> int | None:
    """Returns the precision that a source already has, None where all three are open."""
    if source.module is not None:
        bits = live_bits(source.module)
        return None if bits == 16 else bits
    own = own_bnb(source)
    return None if own is None else (4 if own.get("load_in_4bit") else 8)


def _check_bits(source: ModelSource, bits: int) -> None:
    own = own_bits(source)
    if bits in (16, 8, 4) and own in (None, bits):
        return
    if bits not in (16, 8, 4):
        raise InputError(
            "bad_value", f"bits is {bits}", where="--bits", fix="use 16, 8 or 4, or several of them"
        )
    raise InputError(
        "precision_unavailable",
        f"{source.name} is stored at {own} bit already; {bits} bit cannot be made from it",
        where=source.name,
        fix="inspect the unquantised checkpoint",
    )


def _skip_list(config: Any) -> list[str] | None:
    skip = config.llm_int8_skip_modules
    return None if skip is None else list(skip)


def _check_skip(skip: Any) -> None:
    """Refuses a skip list that transformers would trip over: its keys are regular expressions."""
    where = "llm_int8_skip_modules"
    if skip is None:
        return
    if isinstance(skip, str) or not all(isinstance(key, str) for key in skip):
        raise InputError(
            "bad_value", f"{where} is {skip!r}", where=where, fix="give a list of module names"
        )
    for key in skip:
        try:
            re.compile(key)
        except re.error as error:
            raise InputError(
                "bad_value",
                f"the skip key {key!r} is no regular expression: {error}",
                where=where,
                fix="transformers matches each key as a regular expression: escape special signs",
            ) from error


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(
            "bad_value", f"dtype is {name!r}", where="dtype", fix=f"use one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


@contextmanager
def _quietly() -> Iterator[None]:
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _empty_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the class that `AutoModelForCausalLM.from_pretrained` would, untied."""
    from transformers import initialization

    config = copy.deepcopy(source.config)
    assert config is not None
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    try:
        with (
            initialization.no_tie_weights(),
            initialization.no_init_weights(),
            torch.device("meta"),
            initialization.meta_device_safe_creation_ops(),
        ):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=source.trust_remote_code
            )
    except Exception as error:  # the class read the user's values, whatever it trips over
        raise _cannot_build(source, error) from error
    return model


def _cannot_build(source: ModelSource, error: Exception) -> InputError:
    kind = getattr(source.config, "model_type", "")
    if isinstance(error, ImportError):
        return InputError(
            "missing_package",
            first_line(error),
            where=source.name,
            fix="install the package that the message names",
        )
    text = str(error)
    if "trust_remote_code" in text:
        return InputError(
            "remote_code_needed",
            f"the model class of {kind!r} is Python code that comes with the checkpoint",
            where=source.name,
            fix="read that code, then set trust_remote_code",
        )
    if "Unrecognized configuration class" in text:
        return InputError(
            "no_causal_model",
            f"transformers has no causal language model of the kind {kind!r}",
            where=source.name,
            fix="give a decoder such as llama, qwen2 or gpt2",
        )
    return InputError(
        "bad_model_config",
        f"a {kind} model cannot be built from this config: {first_line(error)}",
        where=source.name,
        fix="repair the value that the message names",
    )


def _convert(model: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> None:
    if plan.config is None:
        return
    quantizer = AutoHfQuantizer.from_config(plan.config, pre_quantized=plan.own)
    with _default_dtype(dtype), torch.device("meta"):
        quantizer.preprocess_model(model, device_map=None)


def _keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives float32 to what the class wants so at 16 bit, by transformers' plan of name globs."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern = re.compile("|".join(key.replace("*", ".*") for key in plan))
    persistent = set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        packed = type(tensor).__name__ in ("Params4bit", "Int8Params")
        if name in persistent and not packed and pattern.search(name) is not None:
            tensor.data = tensor.data.to(torch.float32)


def _convert_w8a16(model: nn.Module, skip: list[str] | None) -> None:
    for path, module in eligible(model, skip):
        model.set_submodule(path, empty_int8(module))


def _from_module(module: nn.Module, plan: Plan) -> Skeleton:
    view = meta_view(module)
    before = dict(view.named_modules())
    if not plan.quantizes:
        return Skeleton(view, before, {})
    keys = skip_keys(view, plan.skip)
    # A bare layer has no name that it could be replaced under.
    bare = not view._modules
    holder: nn.Module = nn.ModuleDict({"layer": view}) if bare else view
    if plan.w8a16:
        _convert_w8a16(holder, plan.skip)
    else:
        _convert_any(holder, plan)
        if isinstance(view, PreTrainedModel):
            view.tie_weights(recompute_mapping=False)
    inner: nn.Module = holder["layer"] if bare else holder  # type: ignore[index]
    return Skeleton(inner, before, keys)


def _convert_any(model: nn.Module, plan: Plan) -> None:
    """Lets transformers replace layers; biases keep the dtype that they have in the module."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    biases = {
        path: part.bias.dtype
        for path, part in model.named_modules()
        if isinstance(getattr(part, "bias", None), torch.Tensor)
    }
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    keep = skip_keys(model, plan.skip)
    replace_with_bnb_linear(
        model, modules_to_not_convert=list(keep), quantization_config=plan.config
    )
    for path, part in model.named_modules():
        if path in biases and part.bias.dtype != biases[path]:
            part.bias.data = part.bias.data.to(biases[path])
        if f"{path}.bias" in trained:
            part.bias.requires_grad_(True)


@cache
def converts_subclasses() -> bool:
    """Whether the installed transformers converts subclasses of `nn.Linear` too, by trying it."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    class Subclass(nn.Linear):
        pass

    with _quietly(), torch.device("meta"):
        model = nn.ModuleDict({"plain": nn.Linear(2, 2), "other": Subclass(2, 2)})
        config = BitsAndBytesConfig(load_in_8bit=True)
        replace_with_bnb_linear(model, modules_to_not_convert=[], quantization_config=config)
    return type(model["other"]) is not Subclass
