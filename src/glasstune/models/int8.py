"""Turns a model's linear layers into int8 ones, by transformers' own rule of which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from glasstune.core.errors import InputError
from glasstune.kernels.int8_linear import Int8Linear

__all__ = ["Int8Linear", "convert_to_int8"]


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
    asked = None if skip_modules is None else list(skip_modules)
    kept_float = getattr(model, "_keep_in_fp32_modules", None)
    keep = HfQuantizer.get_modules_to_not_convert(
        model, asked, None if kept_float is None else list(kept_float)
    )
    converted = []
    for path, module in list(model.named_modules()):
        plain = type(module) is nn.Linear or isinstance(module, Conv1D)
        if not plain or not should_convert_module(path, keep):
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        assert isinstance(weight, torch.Tensor)
        try:
            with torch.no_grad():
                replacement = Int8Linear.from_weight(weight, module.bias)
        except ValueError as error:
            raise InputError(
                "bad_weights", str(error), where=f"{path}.weight", fix="repair the checkpoint"
            ) from error
        replacement.training = module.training
        model.set_submodule(path, replacement)
        converted.append(path)
    return converted
