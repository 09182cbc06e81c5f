"""The record of what float8 products cost each layer, and the rule of which stay in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass, field

from glasstune.core.findings import Finding
from glasstune.core.records import Record

FP8_LIMIT = 0.08
"""From which relative error on a layer stays in bfloat16.

Rounding to e4m3 moves a row of usual numbers by 0.026 of its norm; both factors of a product are
rounded, which gives 0.037, whatever the numbers' size. An error of more than twice that says that
numbers fell out of e4m3's range, or that the product is what is left of terms that cancel.
"""

FP8_OUTLIER = 100.0
"""How many times its row's median a value must be for its channel to be an outlier's.

e4m3 keeps a number's 4 digits down to 1/28,672 of the row's largest.
"""


@dataclass(slots=True)
class Fp8Layer:
    """One layer: its float8 products against the bfloat16 ones of the same numbers.

    Errors are the norm of the difference over the norm; None where nothing finite was seen.

    Args:
        path: Its name in the base model.
        shape: Of the weight, [out, in].
        weight_error: Of the rounded weight alone.
        output_error: Of the output, all rows together.
        row_error: Of the output, the median over the rows of each one's own error.
        gradient_error: Of the input's gradient, all rows together.
        peak: Largest |x| over the median of its row's, zeros left out.
        outliers: Share of x's channels that hold a value above 100 times that median.
        vanished: Share of x's numbers that are zero in float8 and were not.
        gradient_vanished: Likewise of the output's gradient.
        rows: Rows of x, without padding.
        zero_rows: Rows of x that are all zero.
        zero_gradient_rows: Rows of the output's gradient that are.
        bad_rows: Rows of x or of the gradient that hold NaN or Inf already; they are left out.
        overflowed: Numbers that are not finite in float8's product and finite in bfloat16's.
        problem: Why it cannot be float8 at all; empty where it can.
    """

    path: str
    shape: list[int]
    weight_error: float | None = None
    output_error: float | None = None
    row_error: float | None = None
    gradient_error: float | None = None
    peak: float = 0.0
    outliers: float = 0.0
    vanished: float = 0.0
    gradient_vanished: float = 0.0
    rows: int = 0
    zero_rows: int = 0
    zero_gradient_rows: int = 0
    bad_rows: int = 0
    overflowed: int = 0
    problem: str = ""

    @property
    def kind(self) -> str:
        """What layers of its place in a block are called."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def worst(self) -> float:
        """Its largest error of an output or a gradient."""
        return max(self.output_error or 0.0, self.row_error or 0.0, self.gradient_error or 0.0)

    def why_kept(self, limit: float) -> str:
        """Returns why it should stay in bfloat16; empty: it may be float8.

        Args:
            limit: Relative error that is too much.
        """
        if self.problem:
            return self.problem
        if self.overflowed:
            return f"{self.overflowed:,} numbers overflow in float8 that are finite in bfloat16"
        for name, error in (
            ("its output", self.output_error),
            ("half of its output's rows", self.row_error),
            ("its input's gradient", self.gradient_error),
        ):
            if error is not None and error > limit:
                return (
                    f"{name} would be {error:.3f} off the bfloat16 one (from {limit:g} on; usual "
                    f"numbers give 0.037; its largest input is {self.peak:,.0f} times its row's "
                    "median)"
                )
        return ""


@dataclass(slots=True)
class Fp8Record(Record):
    """What float8 products cost each layer of a base: the run's `fp8.json`.

    Args:
        layers: Those whose products can be float8, in the model's order.
        tokens: Of the rows that they were measured with, without padding.
        documents: How many rows those were.
        emulated: Whether a machine without float8 products computed the same numbers.
        limit: The error from which on a layer is kept.
        kept: Layers that stay in bfloat16, each with its reason.
        findings: What was seen beside: numbers that are not finite, layers that no row reached.
    """

    layers: list[Fp8Layer]
    tokens: int
    documents: int
    emulated: bool
    limit: float = FP8_LIMIT
    kept: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def decide(self) -> dict[str, str]:
        """Fills `kept` by the rule and returns it."""
        reasons = {layer.path: layer.why_kept(self.limit) for layer in self.layers}
        self.kept = {path: reason for path, reason in reasons.items() if reason}
        return self.kept
