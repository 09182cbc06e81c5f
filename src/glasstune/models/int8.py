"""Turns a model's linear layers into int8 ones, by transformers' own rule of which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from glasstune.core.errors import InputError
from glasstune.kernels.int8_linear import Int8Linear
from glasstune.models.skips import eligible

__all__ = ["Int8Linear", "convert_to_int8", "empty_int8"]


def convert_to_int8(model: PreTrainedModel, skip_modules: Sequence[str] | None) -> list[str]:
    """Replaces linear layers in place, one at a time, freeing each 16-bit weight at once.

    The rule is transformers' for bitsandbytes: exactly `nn.Linear` or `Conv1D`, no output
    embedding, nothing tied, nothing that must stay float32; `skip_modules` replaces that list.

    Args:
        model: A loaded model.
        skip_modules: Names as in `llm_int8_skip_modules`, or None.

    Returns:
        The paths of the layers that were converted.

    Raises:
        InputError: `bad_weights`: a weight holds NaN or Inf.
    """
    converted = []
    for path, module in eligible(model, skip_modules):
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        bias = module.bias
        assert isinstance(weight, torch.Tensor)
        assert bias is None or isinstance(bias, torch.Tensor)
        try:
            with torch.no_grad():
                replacement = Int8Linear.from_weight(weight, bias)
        except ValueError as error:
            raise InputError(
                "bad_weights", str(error), where=f"{path}.weight", fix="repair the checkpoint"
            ) from error
        replacement.training = module.training
        model.set_submodule(path, replacement)
        converted.append(path)
    return converted


def empty_int8(module: nn.Module) -> Int8Linear:
    """Returns what `convert_to_int8` makes of a layer, on the meta device.

    Args:
        module: An `nn.Linear` or `Conv1D`.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    rows, width = weight.T.shape if isinstance(module, Conv1D) else weight.shape
    kind = bias.dtype if isinstance(bias, torch.Tensor) else None
    return Int8Linear(width, rows, bias is not None, device="meta", dtype=kind)
