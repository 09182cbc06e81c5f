"""Products of frozen weights in float8, with LoRA inside them at bfloat16's precision."""

from glasstune.kernels.fp8.linear import Fp8Linear
from glasstune.kernels.fp8.low import Low, extra_columns, write_low
from glasstune.kernels.fp8.op import Fp8Source, Fp8Weights, fp8_base, fp8_group

__all__ = [
    "Fp8Linear", "Fp8Source", "Fp8Weights", "Low", "extra_columns", "fp8_base", "fp8_group",
    "write_low",
]  # fmt: skip
