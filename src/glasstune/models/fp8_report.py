"""What float8 products cost each layer of a base, measured on a few rows of the run.

Shape letters: R rows, L tokens of a row, T tokens, i input features, n outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from glasstune.core.batch import IGNORED
from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.fp8 import FP8_OUTLIER, Fp8Layer, Fp8Record
from glasstune.kernels.expand import Packed4bit
from glasstune.kernels.fp8 import Fp8Linear
from glasstune.kernels.fp8.product import fp8_product, fp8_rows
from glasstune.kernels.int8_linear import Int8Linear
from glasstune.kernels.lora_group import Layout
from glasstune.models.families.install import padded_kwargs
from glasstune.models.head import split_head
from glasstune.models.packed import four_bit_parts, is_four_bit

__all__ = ["measure_fp8"]


def measure_fp8(
    model: PreTrainedModel,
    layers: Sequence[tuple[str, nn.Module]],
    input_ids: Tensor,
    attention_mask: Tensor,
    targets: Tensor,
) -> Fp8Record:
    """Runs a few rows forward and backward, and each layer's float8 products beside its own.

    The model computes what it always does, so that every layer is measured with the numbers that
    it meets; one layer's weight is expanded and rounded at a time. The model is left as it was.

    Args:
        model: The base, plain and frozen, before its layers are converted.
        layers: Those to measure, as of `models.fp8.candidates`.
        input_ids: int64 [R, L].
        attention_mask: int64 [R, L]; 1 on tokens, then 0.
        targets: int64 [R, L]; the id that each position must predict, -100 = none.

    Returns:
        The record, with nothing decided yet.

    Raises:
        InputError: `bad_weights`: a weight holds NaN or Inf.
    """
    device = model.device
    attention_mask = attention_mask.to(device)
    real = attention_mask.bool()
    meters = [_Meter(Fp8Layer(path, _shape(module)), module, real) for path, module in layers]
    record = Fp8Record(
        layers=[meter.layer for meter in meters],
        tokens=int(real.sum()),
        documents=len(input_ids),
        emulated=device.type != "cuda",
    )
    wanted = targets.to(device).reshape(-1)
    trained = (wanted != IGNORED).nonzero()[:, 0]
    split = split_head(model)
    inputs = {"input_ids": input_ids.to(device), **padded_kwargs(model, attention_mask)}
    with _watched(model, meters), torch.autocast(device.type, dtype=torch.bfloat16):
        whole = split.hidden if split.proven else split.full_logits
        hidden = whole(model, **inputs).flatten(0, 1).index_select(0, trained)
        logits = split.logits(hidden) if split.proven else hidden
        loss = nn.functional.cross_entropy(logits.float(), wanted.index_select(0, trained))
        loss.backward()  # type: ignore[no-untyped-call]
    for meter in meters:
        meter.finish()
    record.findings = _findings(record.layers)
    return record


@contextmanager
def _watched(model: PreTrainedModel, meters: Sequence[_Meter]) -> Iterator[None]:
    """Lets gradients flow through a frozen model, and shows each layer's calls to its meter."""
    embeddings: Any = model.get_input_embeddings()

    def start(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        return output.requires_grad_() if not output.requires_grad else output

    hooks = [embeddings.register_forward_hook(start)]
    hooks += [meter.module.register_forward_hook(meter.forward) for meter in meters]
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            # bitsandbytes says of each layer that its input is cast, which is what autocast is for.
            warnings.simplefilter("ignore")
            yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Distance:
    """Sums of squares of a difference and of what it is measured by."""

    off: float = 0.0
    whole: float = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        self.off += float((got.float() - want.float()).double().square().sum())
        self.whole += float(want.double().square().sum())

    @property
    def relative(self) -> float | None:
        if self.whole == 0:
            return None if self.off == 0 else float("inf")
        return math.sqrt(self.off / self.whole)


@dataclass
class _Meter:
    """Measures the calls of one layer.

    Args:
        layer: Where the numbers go.
        module: The layer.
        real: bool [R, L], false on padding.
    """

    layer: Fp8Layer
    module: nn.Module
    real: Tensor
    output: _Distance = field(default_factory=_Distance)
    gradient: _Distance = field(default_factory=_Distance)
    row_errors: list[Tensor] = field(default_factory=list)
    outlying: Tensor | None = None
    seen: int = 0
    lost: int = 0
    seen_back: int = 0
    lost_back: int = 0

    @torch.no_grad()
    def forward(self, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        """Sees a call, and asks to see its gradient."""
        layer = self.layer
        exact = _weight(module)
        rounded = self._rounded(exact)
        if rounded is None:
            return
        weight = exact.to(torch.bfloat16)
        x_Ti, usable = self._usable(given[0])
        if output.requires_grad:
            output.register_hook(self.backward)  # type: ignore[no-untyped-call]
        layer.rows += len(usable)
        layer.zero_rows += int((x_Ti == 0).all(1).sum())
        if not len(x_Ti):
            return
        self._look_for_outliers(x_Ti)
        with _exact_products(x_Ti.device):
            rows, scale = fp8_rows([x_Ti], None, None, None, 0)
            got = fp8_product(rows, scale, rounded.weight, rounded.scale, torch.bfloat16)
            want = x_Ti @ weight.t()
        self.seen += int((x_Ti != 0).sum())
        self.lost += int(((x_Ti != 0) & (rows.float() == 0)).sum())
        got, want = self._finite(got, want)
        self.output.add(got, want)
        norms = want.float().norm(dim=1)
        errors = (got.float() - want.float()).norm(dim=1)[norms > 0] / norms[norms > 0]
        self.row_errors.append(errors.cpu())

    @torch.no_grad()
    def backward(self, gradient: Tensor) -> None:
        """Sees the gradient of a call's output."""
        layer = self.layer
        grad_Tn, _ = self._usable(gradient)
        layer.zero_gradient_rows += int((grad_Tn == 0).all(1).sum())
        exact = _weight(self.module)
        rounded = self._rounded(exact)
        weight = exact.to(torch.bfloat16)
        if not len(grad_Tn) or rounded is None:
            return
        with _exact_products(grad_Tn.device):
            rows, scale = fp8_rows([grad_Tn], None, None, None, 0)
            got = fp8_product(rows, scale, rounded.turned, rounded.turned_scale, torch.bfloat16)
            want = grad_Tn @ weight
        self.seen_back += int((grad_Tn != 0).sum())
        self.lost_back += int(((grad_Tn != 0) & (rows.float() == 0)).sum())
        self.gradient.add(*self._finite(got, want))

    def finish(self) -> None:
        """Writes what comes of all calls."""
        layer = self.layer
        layer.output_error = _number(self.output.relative)
        layer.gradient_error = _number(self.gradient.relative)
        errors = torch.cat(self.row_errors) if self.row_errors else torch.zeros(0)
        layer.row_error = float(errors.median()) if len(errors) else None
        if self.outlying is not None:
            layer.outliers = float(self.outlying.float().mean())
        layer.vanished = self.lost / max(1, self.seen)
        layer.gradient_vanished = self.lost_back / max(1, self.seen_back)

    def _rounded(self, weight: Tensor) -> Fp8Linear | None:
        """Returns the layer in float8, as the run would have it; None where it cannot be."""
        layer = self.layer
        if layer.problem:
            return None
        try:
            rounded = Fp8Linear.from_weight(weight)
        except ValueError as error:
            if not bool(torch.isfinite(weight).all()):
                raise InputError(
                    "bad_weights", str(error), where=f"{layer.path}.weight",
                    fix="repair the checkpoint",
                ) from error  # fmt: skip
            layer.problem = str(error)
            return None
        if layer.weight_error is None:
            distance = _Distance()
            distance.add(rounded.dequantize(), weight)
            layer.weight_error = _number(distance.relative)
        return rounded

    def _usable(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the finite rows in bfloat16, [T, i], and which of the real ones those are."""
        if values.shape[:-1] == self.real.shape:
            values = values[self.real]
        rows = values.detach().reshape(-1, values.shape[-1]).to(torch.bfloat16)
        usable = torch.isfinite(rows).all(1)
        self.layer.bad_rows += int((~usable).sum())
        return rows[usable], usable

    def _look_for_outliers(self, x_Ti: Tensor) -> None:
        layer = self.layer
        exact = x_Ti.float().abs()
        usual = exact.masked_fill(exact == 0, torch.nan).nanmedian(1, keepdim=True).values
        ratio = (exact / usual).nan_to_num(0.0)
        layer.peak = max(layer.peak, float(ratio.max()))
        outlying = (ratio > FP8_OUTLIER).any(0)
        self.outlying = outlying if self.outlying is None else self.outlying | outlying

    def _finite(self, got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
        """Returns rows that are finite in both, and counts what overflowed in float8 alone."""
        self.layer.overflowed += int((torch.isfinite(want) & ~torch.isfinite(got)).sum())
        both = torch.isfinite(want).all(1) & torch.isfinite(got).all(1)
        return got[both], want[both]


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False):
        yield


def _weight(module: Any) -> Tensor:
    """Returns a layer's weight [out, in] as it is rounded to float8: a packed one in float32."""
    if isinstance(module, Int8Linear):
        return module.dequantize()
    if is_four_bit(module):
        parts = four_bit_parts(module)
        if isinstance(parts, str):
            raise ValueError(parts)
        code, absmax, offset = ([tensor] for tensor in parts.nested) if parts.nested else ([],) * 3
        packed = Packed4bit(
            [parts.packed], [parts.absmax], code, absmax, offset, parts.code, parts.block
        )
        layout = Layout(module.in_features, (module.out_features,), (), ())
        return packed.expand(layout, [], [], torch.float32, [])
    weight: Tensor = module.weight.detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def _shape(module: Any) -> list[int]:
    if isinstance(module, Conv1D):
        return [int(size) for size in reversed(module.weight.shape)]
    return [int(module.out_features), int(module.in_features)]


def _number(value: float | None) -> float | None:
    return value if value is not None and value < float("inf") else None


def _findings(layers: Sequence[Fp8Layer]) -> list[Finding]:
    """Says what numbers were not finite, and which layers were not seen."""
    findings = []

    def say(code: str, severity: Any, test: Callable[[Fp8Layer], bool], text: str) -> None:
        found = [layer for layer in layers if test(layer)]
        if found:
            count = f"{len(found)} of {len(layers)} layers"
            findings.append(Finding(code, severity, found[0].path, f"{count} {text}"))

    say(
        "not_finite", "warning", lambda layer: layer.bad_rows > 0,
        "meet rows with NaN or Inf in bfloat16 already; those were left out",
    )  # fmt: skip
    say(
        "fp8_overflow", "warning", lambda layer: layer.overflowed > 0,
        "overflow in float8 where bfloat16 does not",
    )  # fmt: skip
    say(
        "fp8_vanished", "info", lambda layer: max(layer.vanished, layer.gradient_vanished) > 0.01,
        "have more than 1 % of their inputs' or gradients' numbers rounded to zero",
    )  # fmt: skip
    say(
        "not_seen", "info", lambda layer: not layer.rows and not layer.problem,
        "were not called with these rows, so nothing is known of them",
    )  # fmt: skip
    return findings
