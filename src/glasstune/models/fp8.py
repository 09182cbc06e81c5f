"""Turns a model's linear layers into float8 ones."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.errors import InputError
from glasstune.kernels.fp8 import Fp8Linear
from glasstune.kernels.fp8.product import fp8_product, fp8_rows
from glasstune.kernels.int8_linear import Int8Linear
from glasstune.models.load import choose_device
from glasstune.models.packed import is_four_bit
from glasstune.models.skips import eligible

__all__ = [
    "Fp8Linear",
    "candidates",
    "check_device",
    "convert_to_fp8",
    "kept",
    "mark_fp8",
    "to_fp8",
]


def to_fp8(model: Any, config: Config, choices: Choices) -> list[str]:
    """Gives a loaded base float8 products.

    Args:
        model: A loaded base, without adapters.
        config: `training.fp8_keep` and `model.quantization`.
        choices: Notes how many layers, and where products are emulated.

    Returns:
        The paths of the layers that were converted, or marked where they are packed.

    Raises:
        InputError: `no_fp8`: the GPU has none. `bad_weights`: see `convert_to_fp8`.
            `nothing_quantized`: no layer is left to convert. `no_such_layer`: a pattern of
            `fp8_keep` fits none.
    """
    # Not the model's: a base that will be sharded is still in the host's memory.
    device = choose_device(config.model.device, choices)
    check_device(device)
    if device.type != "cuda":
        choices.record(
            "training.compute", "fp8", f"emulated: a {device.type} multiplies the float8 numbers "
            "in float32, which shows what a GPU computes and is slower than bf16",
        )  # fmt: skip
    keep = config.training.fp8_keep
    names = [] if keep == "auto" else keep
    config.training.fp8_keep = names
    skip = config.model.quantization.get("llm_int8_skip_modules")
    _check_names(names, [path for path, _ in candidates(model, skip)])
    done = convert_to_fp8(model, skip, names) + mark_fp8(model, names)
    if not done:
        raise InputError(
            "nothing_quantized",
            "training.compute is fp8, but no linear layer is left to convert",
            where="training.fp8_keep" if names else "training.compute",
            fix="shorten training.fp8_keep, or leave training.compute out",
        )
    choices.record(
        "training.fp8_layers", len(done),
        "exactly nn.Linear or Conv1D; the head, what is tied and training.fp8_keep stay bfloat16",
    )  # fmt: skip
    return done


def candidates(
    model: PreTrainedModel, skip_modules: Sequence[str] | None
) -> list[tuple[str, nn.Module]]:
    """Returns paths and layers whose products can be float8, at any number of bits.

    Args:
        model: A loaded base, before its conversion.
        skip_modules: Names as in `llm_int8_skip_modules`, or None.
    """
    plain = {path for path, _ in eligible(model, skip_modules)}
    return [
        (path, module)
        for path, module in model.named_modules()
        if path in plain or type(module) is Int8Linear or is_four_bit(module)
    ]


def _check_names(names: Sequence[str], paths: Sequence[str]) -> None:
    for name in names:
        if not any(kept(path, [name]) for path in paths):
            near = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
            raise InputError(
                "no_such_layer",
                f"training.fp8_keep names {name!r}, and no layer of the base is called so",
                where="training.fp8_keep",
                fix=f"give paths, endings or globs; the layers end with {near}",
            )


def check_device(device: torch.device) -> None:
    """Tries a float8 product.

    Raises:
        InputError: `no_fp8`: the GPU does not have them.
    """
    if device.type != "cuda":
        return
    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    why = f"its compute capability is {major}.{minor}, and float8 products need 8.9"
    if (major, minor) >= (8, 9):
        ones = torch.ones(32, 32, device=device, dtype=torch.bfloat16)
        try:
            rows, scale = fp8_rows([ones], None, None, None, 0)
            fp8_product(rows, scale, rows, scale[:, 0], torch.bfloat16)
            return
        except (RuntimeError, ImportError) as error:
            why = str(error).strip().splitlines()[0]
    raise InputError(
        "no_fp8",
        f"training.compute is fp8, and {name} cannot: {why}",
        where="training.compute",
        fix="leave training.compute out: bfloat16 products of the same base; model.bits: 8 takes "
        "the least memory of those that round little, 4 the least of all",
    )


def convert_to_fp8(
    model: PreTrainedModel, skip_modules: Sequence[str] | None, keep: Sequence[str] = ()
) -> list[str]:
    """Replaces linear layers in place, one at a time, freeing each 16-bit weight at once.

    Which ones is the rule of 8- and 4-bit loads: exactly `nn.Linear` or `Conv1D`, no output
    embedding, nothing tied, nothing that must stay float32.

    Args:
        model: A loaded model.
        skip_modules: Names as in `llm_int8_skip_modules`, or None.
        keep: Glob patterns of paths that stay as they are.

    Returns:
        The paths of the layers that were converted.

    Raises:
        InputError: `bad_weights`: a weight holds NaN or Inf, or a width that is no multiple of 16.
    """
    converted = []
    for path, module in eligible(model, skip_modules):
        if kept(path, keep):
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        bias = module.bias
        assert isinstance(weight, torch.Tensor)
        assert bias is None or isinstance(bias, torch.Tensor)
        try:
            replacement = Fp8Linear.from_weight(weight.detach(), bias)
        except ValueError as error:
            raise InputError(
                "bad_weights", str(error), where=f"{path}.weight",
                fix="repair the checkpoint, or name the layer in training.fp8_keep",
            ) from error  # fmt: skip
        replacement.training = module.training
        model.set_submodule(path, replacement)
        converted.append(path)
    return converted


def kept(path: str, patterns: Sequence[str]) -> bool:
    """Whether a layer stays in bfloat16: a pattern is its path, its ending, or a glob of either."""
    return any(fnmatch(path, p) or fnmatch(path, f"*.{p}") for p in patterns)


def mark_fp8(model: nn.Module, keep: Sequence[str] = ()) -> list[str]:
    """Lets packed layers (4-bit, and int8 with row scales) ask for float8 products.

    Their packed weights stay what they are. Under `speed_up` the products of their groups are
    float8; a layer's own forward stays 16 bit, and so does what the speed report names so.

    Args:
        model: A loaded model; marks that it has are set anew.
        keep: Patterns of paths that stay as they are, see `kept`.

    Returns:
        The paths of the layers that are marked.

    Raises:
        InputError: `bad_weights`: a width that is no multiple of 16.
    """
    marked = []
    for path, module in model.named_modules():
        if not (is_four_bit(module) or type(module) is Int8Linear):
            continue
        layer: Any = module
        layer._glasstune_fp8 = not kept(path, keep)
        if not layer._glasstune_fp8:
            continue
        if layer.in_features % 16 or layer.out_features % 16:
            raise InputError(
                "bad_weights",
                "a float8 weight has multiples of 16 rows and columns, not "
                f"{layer.out_features} x {layer.in_features}",
                where=f"{path}.weight", fix="name the layer in training.fp8_keep",
            )  # fmt: skip
        marked.append(path)
    return marked
