"""What a base's weights were where an adapter was trained on them: quantised and expanded again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.kernels.expand.reference import block_scales, expand_4bit_reference
from glasstune.kernels.fp8.numbers import power_scales, to_rows
from glasstune.kernels.int8_linear.reference import expand_rows, quantize_rows
from glasstune.models.empty import float32_names
from glasstune.models.fp8 import kept
from glasstune.models.quantization import BLOCK_4BIT, bnb_config, int8_compute
from glasstune.models.skips import eligible


class TrainingBase:
    """The weights that a run's base had, one at a time.

    Call it with a weight's name and its stored value, and it gives what training multiplied by,
    in training's own type: the original cast to the run's type, and where the layer was stored at
    8 or 4 bit, packed and expanded.

    Args:
        model: The plain base on the meta device.
        config: The run's model section.
        fp8_keep: Where products were float8, the patterns of layers that stayed; else None.
        adapted: Names of the weights under an adapter: of a packed base only these are multiplied
            in float8. None: all are.

    Raises:
        InputError: The section's quantisation options contradict each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ModelConfig,
        fp8_keep: Sequence[str] | None = None,
        adapted: Collection[str] | None = None,
    ) -> None:
        self.bits = config.bits
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._float32 = float32_names(model, list(model.state_dict()), self.dtype)
        self._turned: dict[str, bool] = {}
        self._int8 = int8_compute(config, Choices())
        options: Any = bnb_config(config, self.dtype, Choices())
        self._kind = str(getattr(options, "bnb_4bit_quant_type", "nf4"))
        self._double = bool(getattr(options, "bnb_4bit_use_double_quant", False))
        self._fp8: set[str] = set()
        skip = config.quantization.get("llm_int8_skip_modules")
        if self.bits != 16 or fp8_keep is not None:
            self._turned = {
                f"{path}.weight": isinstance(module, Conv1D)
                for path, module in eligible(model, skip)
            }
        if fp8_keep is not None:
            self._fp8 = {
                name
                for name in self._turned
                if not kept(name[:-7], fp8_keep)
                and (self.bits == 16 or adapted is None or name in adapted)
            }

    @property
    def label(self) -> str:
        """The precision in a few words: `4 bit (nf4, double quantisation), bfloat16`."""
        dtype = str(self.dtype).removeprefix("torch.")
        fp8 = ", rounded to float8" if self._fp8 else ""
        if self.bits == 4:
            double = ", double quantisation" if self._double else ""
            return f"4 bit ({self._kind}{double}), {dtype}{fp8}"
        return f"8 bit ({self._int8}), {dtype}{fp8}" if self.bits == 8 else dtype + fp8

    def changes(self, name: str, stored: torch.dtype) -> bool:
        """Whether a weight of this stored type was another in training."""
        return name in self._turned or (name not in self._float32 and stored != self.dtype)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """Returns a weight as training had it.

        Raises:
            InputError: `bad_weights`: NaN or Inf in a weight that is quantised.
        """
        if not value.is_floating_point() or name in self._float32:
            return value
        value = value.to(self.dtype)
        turned = self._turned.get(name)
        if turned is None:
            return value
        rows = value.T.contiguous() if turned else value
        try:
            if name in self._fp8:  # a packed weight goes to float8 without bfloat16 between
                exact = self._expanded(rows, torch.float32)
                scale = power_scales(exact)
                expanded = (to_rows(exact, scale).float() * scale[:, None]).to(self.dtype)
            else:
                expanded = self._expanded(rows, self.dtype)
        except ValueError as error:
            raise InputError(
                "bad_weights", str(error), where=name, fix="repair the checkpoint"
            ) from error
        return expanded.T.contiguous() if turned else expanded

    def _expanded(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if self.bits == 16:
            return rows
        return self._four_bit(rows, dtype) if self.bits == 4 else self._eight_bit(rows, dtype)

    def _eight_bit(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if self._int8 == "w8a16":
            return expand_rows(*quantize_rows(rows), dtype)
        from bitsandbytes import functional

        stored, scale, _ = functional.int8_vectorwise_quant(rows.to(torch.float16))
        return expand_rows(stored, scale.float(), dtype)

    def _four_bit(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(
            rows, blocksize=BLOCK_4BIT, compress_statistics=self._double, quant_type=self._kind
        )
        nested = (None, None, None)
        if state.nested:
            nested = (state.state2.code, state.state2.absmax, state.offset)
        out = torch.empty_like(rows, dtype=dtype)
        expand_4bit_reference(
            packed.reshape(-1).view(torch.uint8),
            block_scales(state.absmax, *nested),
            state.code,
            BLOCK_4BIT,
            out,
        )
        return out
