"""What a precision means for one source: which options of whom, and who replaces the layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.quantizers.auto import AutoHfQuantizer

from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.models.inspect.live import live_bits
from glasstune.models.inspect.source import ModelSource, own_quantization, quantization_method
from glasstune.models.quantization import (
    bnb_config,
    check_quantization_keys,
)
from glasstune.models.quantization import int8_compute as chosen_int8_compute
from glasstune.models.quiet import quiet_transformers

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
    with quietly():
        config = bnb_config(model, load_dtype(dtype), Choices())
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


def load_dtype(name: str) -> torch.dtype:
    """Returns a load dtype by its name.

    Raises:
        InputError: `bad_value`.
    """
    if name not in DTYPES:
        raise InputError(
            "bad_value", f"dtype is {name!r}", where="dtype", fix=f"use one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


@contextmanager
def quietly() -> Iterator[None]:
    """Neither bars, log lines nor warnings of the libraries that build and convert."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
