"""How far 8- and 4-bit storage moves each weight, read a few rows at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.inspection import ErrorReport, LayerError
from glasstune.core.protocols import Progress
from glasstune.core.units import format_bytes
from glasstune.models.inspect.dry_run import skeleton
from glasstune.models.inspect.live import foreign_quantization, live_bits
from glasstune.models.inspect.match import LeafWeight, live_leaves, match_leaves
from glasstune.models.inspect.source import ModelSource, own_quantization, quantization_method
from glasstune.models.inspect.weights import Rows, open_checkpoint, weights_folder
from glasstune.models.quantization import BLOCK_4BIT, misread_widths

KEYS = ("8", "nf4", "fp4", "nf4_double")

DEFAULT_MEMORY = 4 * 2**30
"""Bytes that may be held at a time, beside the process itself."""

_NESTED_BLOCK = 256
"""Scales that share a scale of their own under double quantisation."""

_CHUNK = 2**18
"""Weights at a time: 2^17 to 2^20 are equally fast on a CPU, 2^22 is slower."""

_CHUNK_BYTES = 64
"""Peak of temporaries by weight of a chunk (measured: up to 55): float32 and int32 copies."""

_TASK = "quantisation error"


def quantization_error(
    source: ModelSource,
    leaves: Sequence[tuple[str, list[int]]],
    *,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
    memory_bytes: int | None = None,
) -> ErrorReport:
    """Measures |Q(W) - W| / |W| (Frobenius) of every layer that would be quantised.

    Q is what bitsandbytes stores and reads back: LLM.int8 rows, NF4 and FP4 in blocks of 64, and
    NF4 with double quantisation. W is what a load at `dtype` holds, so a float32 checkpoint is
    rounded first.

    Args:
        source: The model; its weights are read from its folder, the local hub cache, the
            expansion of its GGUF file, or the live module.
        leaves: Module path and (out, in) of every layer that would be quantised.
        dtype: Of the load: `bfloat16`, `float16` or `float32`.
        progress: Where the bar is drawn.
        memory_bytes: What may be held at a time; None for 4 GiB.

    Returns:
        Layers by error at NF4, worst first. A layer whose weight is missing, has another shape
        or holds NaN or Inf is in the findings instead.

    Raises:
        InputError: `no_weights`, `already_quantized`, `memory_budget`, `bad_weights`,
            `bad_index`; `bad_gguf` for a GGUF file that cannot be expanded.
    """
    began = time.monotonic()
    budget = DEFAULT_MEMORY if memory_bytes is None else memory_bytes
    _refuse_quantized(source)
    weights, where, findings = _weights(source, leaves, budget)
    steps = {weight.path: _step(weight, budget) for weight in weights}
    bar = _Bar(progress, sum(weight.size for weight in weights))
    layers: list[LayerError] = []
    total = _Sums()
    for weight in sorted(weights, key=lambda weight: weight.order):
        sums = _measure(weight, getattr(torch, dtype), steps[weight.path], bar)
        if sums.not_finite:
            findings.append(_not_finite(weight, sums.not_finite, dtype))
            continue
        if sums.overflowed:
            findings.append(_overflow(weight, sums.overflowed))
        layers.append(sums.layer(weight))
        total.add(sums)
    bar.finish()
    findings.extend(_rounded(weights, dtype))
    findings.extend(_misread(weights, getattr(torch, dtype)))
    places = {path: position for position, (path, _) in enumerate(leaves)}
    layers.sort(key=lambda layer: (-layer.errors["nf4"], places[layer.path]))
    mean = total.relative() if layers else {}
    return ErrorReport(layers, mean, where, time.monotonic() - began, findings)


@dataclass(slots=True)
class _Sums:
    """Squares summed in float64 over one weight or all, by precision."""

    weight: float = 0.0
    moved: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KEYS, 0.0))
    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KEYS, 0.0))
    not_finite: int = 0
    overflowed: int = 0

    def rows(self, key: str, expanded: Tensor, chunk: Tensor) -> None:
        """Adds rows: `expanded` is what is read back, `chunk` [rows, in] the weight."""
        moved = _row_norms(expanded.reshape(chunk.shape).float() - chunk.float())
        self.moved[key] += float(moved.square().sum())
        shares = moved / _row_norms(chunk)
        # A row of zeros is stored exactly: 0 of 0 is no error.
        self.worst[key] = max(self.worst[key], float(shares.masked_fill(moved == 0, 0.0).max()))

    def add(self, other: _Sums) -> None:
        """Adds another weight's sums."""
        self.weight += other.weight
        for key in KEYS:
            self.moved[key] += other.moved[key]

    def relative(self) -> dict[str, float]:
        """Returns the norm of what moved over the norm of the weight; 0 for a weight of zeros."""
        return {key: _share(moved, self.weight) for key, moved in self.moved.items()}

    def layer(self, weight: LeafWeight) -> LayerError:
        """Returns the record of one layer."""
        return LayerError(weight.path, list(weight.shape), self.relative(), dict(self.worst))


def _share(moved: float, weight: float) -> float:
    if moved == 0:
        return 0.0
    return math.sqrt(moved / weight) if math.isfinite(moved) else math.inf


def _row_norms(value: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(value, dim=1, dtype=torch.float64)
    return norms


class _Codes:
    """A weight's packed NF4 codes and scales, in two tensors made at once.

    A list with a piece a chunk would pin the heap between the temporaries: 200 MB instead of 40
    for a weight of 2,048 x 16,384.
    """

    def __init__(self, count: int) -> None:
        self.packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8)
        self.scales = torch.empty(-(-count // BLOCK_4BIT))

    def span(self, first: int, last: int) -> tuple[slice, slice]:
        """Returns where the codes and scales of weights first..last lie; first is a block's."""
        return (
            slice(first // 2, (last + 1) // 2),
            slice(first // BLOCK_4BIT, -(-last // BLOCK_4BIT)),
        )


@torch.no_grad()
def _measure(weight: LeafWeight, dtype: torch.dtype, step: int, bar: _Bar) -> _Sums:
    """Goes through a weight in chunks of whole rows and whole blocks.

    A chunk is a multiple of 64 weights, so its blocks are those of the whole tensor, and rows are
    independent at 8 bit: the result is that of the whole tensor, bit for bit. Only double
    quantisation looks across: its packed NF4 codes and scales are kept for a second pass.
    """
    sums = _Sums()
    rows = weight.open()
    out, width = weight.shape
    codes = _Codes(out * width)
    for start in range(0, out, step):
        stop = min(start + step, out)
        chunk = rows(start, stop).to(dtype).contiguous()
        bar.advance(weight, stop - start)
        sums.not_finite += chunk.numel() - int(torch.isfinite(chunk).sum())
        if sums.not_finite:  # nothing can be said of it, only how many
            continue
        sums.weight += float(_row_norms(chunk).square().sum())
        sums.overflowed += _int8(sums, chunk)
        _four_bit(sums, "fp4", chunk)
        packed, scales = codes.span(start * width, stop * width)
        codes.packed[packed], codes.scales[scales] = _four_bit(sums, "nf4", chunk)
    if not sums.not_finite:
        _nested(sums, weight, rows, dtype, step, codes)
    return sums


def _int8(sums: _Sums, chunk: Tensor) -> int:
    """LLM.int8 casts to float16 first; returns how many weights that makes Inf."""
    half = chunk.to(torch.float16)
    overflowed = half.numel() - int(torch.isfinite(half).sum())
    if overflowed:
        sums.moved["8"] = sums.worst["8"] = math.inf
        return overflowed
    stored, scale, _ = bnb.int8_vectorwise_quant(half)
    sums.rows("8", bnb.int8_vectorwise_dequant(stored, scale), chunk)
    return 0


def _four_bit(sums: _Sums, kind: str, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Returns packed codes and scales."""
    packed, state = bnb.quantize_4bit(chunk.reshape(-1), blocksize=BLOCK_4BIT, quant_type=kind)
    sums.rows(kind, _expand(packed, state.absmax, kind, chunk), chunk)
    return packed, state.absmax


def _expand(packed: Tensor, scale: Tensor, kind: str, chunk: Tensor) -> Tensor:
    """Reads codes back as `chunk.numel()` weights of its dtype.

    As one row of an even number, whatever the shape: blocks do not know rows, and for odd rows
    bitsandbytes would compile a slower function.
    """
    count = chunk.numel()
    state = bnb.QuantState(
        absmax=scale,
        shape=torch.Size((1, count + count % 2)),
        dtype=chunk.dtype,
        blocksize=BLOCK_4BIT,
        quant_type=kind,
    )
    expanded: Tensor = bnb.dequantize_4bit(packed, state)
    return expanded.reshape(-1)[:count]


def _nested(
    sums: _Sums, weight: LeafWeight, rows: Rows, dtype: torch.dtype, step: int, codes: _Codes
) -> None:
    """Second pass: the same codes, their scales stored in 8 bit around their mean."""
    out, width = weight.shape
    mean = codes.scales.mean()
    stored, state = bnb.quantize_blockwise(codes.scales - mean, blocksize=_NESTED_BLOCK)
    nested = bnb.dequantize_blockwise(stored, state) + mean
    for start in range(0, out, step):
        stop = min(start + step, out)
        chunk = rows(start, stop).to(dtype).contiguous()
        packed, scales = codes.span(start * width, stop * width)
        expanded = _expand(codes.packed[packed], nested[scales], "nf4", chunk)
        sums.rows("nf4_double", expanded, chunk)


def _step(weight: LeafWeight, budget: int) -> int:
    """Returns rows a chunk: whole blocks, within the budget.

    Raises:
        InputError: `memory_budget`.
    """
    out, width = weight.shape
    unit = BLOCK_4BIT // math.gcd(width, BLOCK_4BIT)
    # Packed NF4 codes, and some copies of the scales.
    kept = out * width // 2 + 16 * (out * width // BLOCK_4BIT)
    room = (budget - weight.held - kept) // _CHUNK_BYTES
    least = unit * width
    if room < least:
        needed = weight.held + kept + least * _CHUNK_BYTES
        raise InputError(
            "memory_budget",
            f"this weight of {out:,} x {width:,} needs {format_bytes(needed)} at a time, the "
            f"budget is {format_bytes(budget)}",
            where=weight.path,
            fix="raise the budget",
        )
    return max(1, min(_CHUNK, room) // least) * unit


def _refuse_quantized(source: ModelSource) -> None:
    if source.module is not None:
        bits, foreign = live_bits(source.module), foreign_quantization(source.module)
        how = foreign or ("" if bits == 16 else f"{bits} bit")
    else:
        own = None if source.config is None else own_quantization(source.config)
        how = "" if own is None or source.kind == "gguf" else quantization_method(own)
    if not how:
        return
    raise InputError(
        "already_quantized",
        f"the model is quantised already ({how}): without its 16-bit original there is no error "
        "to take",
        where=source.name,
        fix="give the original checkpoint, or leave out --error",
    )


def _weights(
    source: ModelSource, leaves: Sequence[tuple[str, list[int]]], budget: int
) -> tuple[list[LeafWeight], str, list[Finding]]:
    """Returns every leaf's weight, where they are read, and what was unusual."""
    if source.module is not None:
        weights, findings = live_leaves(source.module, leaves)
        return weights, f"live module {type(source.module).__name__}", findings
    expanded = 2 * sum(math.prod(shape) for _, shape in leaves)
    folder, note = weights_folder(source, expanded, budget)
    checkpoint = open_checkpoint(folder, budget)
    weights, findings = match_leaves(skeleton(source, 16), checkpoint, leaves)
    return weights, str(folder), [note, *checkpoint.findings, *findings]


def _rounded(weights: Sequence[LeafWeight], dtype: str) -> list[Finding]:
    others = sorted({weight.dtype for weight in weights} - {dtype})
    if not others:
        return []
    count = sum(weight.dtype != dtype for weight in weights)
    says = (
        f"{count} of {len(weights)} weights are stored as {', '.join(others)}: they were rounded "
        f"to {dtype} first, as a load does, and errors are against that"
    )
    return [Finding("rounded_first", "info", dtype, says)]


def _misread(weights: Sequence[LeafWeight], dtype: torch.dtype) -> list[Finding]:
    """Warns where bitsandbytes on this CPU reads 4-bit rows of some width back wrong.

    The errors here are those of the format, which CUDA reads right.
    """
    findings = []
    for width in misread_widths((weight.shape[1] for weight in weights), dtype):
        paths = [weight.path for weight in weights if weight.shape[1] == width]
        says = (
            f"bitsandbytes reads 4-bit rows of {width} weights back wrong on this CPU "
            f"({len(paths)} layers): they run with other weights than these errors speak of; "
            "on CUDA they do not"
        )
        fix = "run this model at 4 bit on a GPU only, or keep these layers in 16 bit"
        findings.append(Finding("cpu_4bit_misread", "warning", paths[0], says, fix))
    return findings


def _not_finite(weight: LeafWeight, count: int, dtype: str) -> Finding:
    says = (
        f"{weight.name} holds {count:,} NaN or Inf of {math.prod(weight.shape):,} weights"
        f"{'' if weight.dtype == dtype else f' once it is {dtype}'}: no error can be taken"
    )
    fix = "download the checkpoint again, or repair it: quantised, whole blocks and rows are lost"
    return Finding("bad_weights", "error", weight.path, says, fix)


def _overflow(weight: LeafWeight, count: int) -> Finding:
    says = (
        f"{count:,} weights of {weight.name} are beyond 65,504: LLM.int8 casts to float16, where "
        "they become Inf"
    )
    fix = "use 4 bit or model.int8_compute=w8a16, or keep the layer in 16 bit"
    return Finding("int8_overflow", "error", weight.path, says, fix)


class _Bar:
    """Progress in megabytes with a rate; a layer with several chunks moves it in between."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress = progress
        self.done = 0.0
        self.told = 0
        self.began = time.monotonic()
        if progress is not None:
            progress.start(_TASK, math.ceil(total / 1e6), "MB")

    def advance(self, weight: LeafWeight, rows: int) -> None:
        """Says that rows of a weight were read."""
        if self.progress is None:
            return
        self.done += weight.size * rows / weight.shape[0] / 1e6
        rate = self.done / max(time.monotonic() - self.began, 1e-9)
        amount = int(self.done) - self.told
        self.told += amount
        self.progress.advance(_TASK, amount, rate=f"{rate:.0f} MB/s", layer=weight.path)

    def finish(self) -> None:
        """Closes the bar."""
        if self.progress is not None:
            self.progress.finish(_TASK)
