"""Turns a model's linear layers into float8 ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from glasstune.core.errors import InputError
from glasstune.kernels.fp8 import Fp8Linear
from glasstune.models.skips import eligible

__all__ = ["Fp8Linear", "convert_to_fp8"]


def convert_to_fp8(
    model: PreTrainedModel, skip_modules: Sequence[str] | None, keep: Collection[str] = ()
) -> list[str]:
    """Replaces linear layers in place, one at a time, freeing each 16-bit weight at once.

    Which ones is the rule of 8- and 4-bit loads: exactly `nn.Linear` or `Conv1D`, no output
    embedding, nothing tied, nothing that must stay float32.

    Args:
        model: A loaded model.
        skip_modules: Names as in `llm_int8_skip_modules`, or None.
        keep: Paths of layers that stay as they are.

    Returns:
        The paths of the layers that were converted.

    Raises:
        InputError: `bad_weights`: a weight holds NaN or Inf, or a width that is no multiple of 16.
    """
    converted = []
    for path, module in eligible(model, skip_modules):
        if path in keep:
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
