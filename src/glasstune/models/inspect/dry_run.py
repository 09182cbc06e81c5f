"""The model's skeleton on the meta device, converted as a real load would convert it.

Class by class the steps of `from_pretrained(..., quantization_config=...)`: build under the load
dtype without tying, let transformers' own quantiser replace layers, give float32 to what must stay
so, tie last. No weight exists at any point.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.models.inspect.config_check import first_line
from glasstune.models.inspect.live import meta_view
from glasstune.models.inspect.plan import Plan, load_dtype, make_plan, quietly
from glasstune.models.inspect.source import ModelSource
from glasstune.models.int8 import empty_int8
from glasstune.models.skips import SkipReason, eligible, skip_keys


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
    load = load_dtype(dtype)
    with quietly():
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

    def built(**attention: str) -> PreTrainedModel:
        with (
            initialization.no_tie_weights(),
            initialization.no_init_weights(),
            torch.device("meta"),
            initialization.meta_device_safe_creation_ops(),
        ):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=source.trust_remote_code, **attention
            )
        return model

    try:
        try:
            return built()
        except (ImportError, ValueError) as error:
            if not _lacks_attention(source, error):
                raise
            return built(attn_implementation="eager")
    except Exception as error:  # the class read the user's values, whatever it trips over
        raise _cannot_build(source, error) from error


def _lacks_attention(source: ModelSource, error: Exception) -> bool:
    """Whether only the attention that the config asks for is missing; then it is a finding."""
    asked = getattr(source.config, "_attn_implementation", None)
    if asked in (None, "eager", "sdpa") or "attention" not in str(error).lower():
        return False
    finding = Finding(
        "attention_missing",
        "warning",
        source.name,
        f"the config asks for {asked}, which does not run here; the tree does not depend on it",
        "for a load, set model.attn_implementation=sdpa or install what it needs: "
        f"{first_line(error)}",
    )
    if finding not in source.findings:
        source.findings.append(finding)
    return True


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

    with quietly(), torch.device("meta"):
        model = nn.ModuleDict({"plain": nn.Linear(2, 2), "other": Subclass(2, 2)})
        config = BitsAndBytesConfig(load_in_8bit=True)
        replace_with_bnb_linear(model, modules_to_not_convert=[], quantization_config=config)
    return type(model["other"]) is not Subclass
