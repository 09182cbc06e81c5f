"""Attention of packed rows on a GPU: distance to the truth, milliseconds, and that nothing waits.

    python bench/gpu_attention.py            # all forms, then times
    python bench/gpu_attention.py --quick    # six forms, no times

Each form's output and gradients are compared with dense attention in float64. Ours may be at most
twice as far from it as the same dense attention in the form's own dtype; the exit code is 1 where
it is farther. One line a form; the last line is `RESULT {json}`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from glasstune.kernels.document_attention.flex import document_blocks, flex_document_attention
from glasstune.models.families.flex import document_numbers, packed_blocks

DEVICE = "cuda"
KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}
SLACK = 1e-7
"""Share of the truth's norm below which a distance is rounding of the comparison itself."""


@dataclass(frozen=True)
class Form:
    """One form of attention.

    Args:
        name: Printed.
        kind: Key of `KINDS`.
        heads: H.
        groups: G, key/value heads.
        width: D.
        rows: R.
        length: L.
        documents: Shortest and longest document, or None for one a row.
        window: Of a sliding layer.
        softcap: Cap of the scores.
        alibi: Whether a slope times the distance is added.
    """

    name: str
    kind: str = "bf16"
    heads: int = 8
    groups: int = 2
    width: int = 128
    rows: int = 2
    length: int = 1024
    documents: tuple[int, int] | None = (60, 400)
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False


FORMS = [
    Form("packed"),
    Form("packed, no GQA, last block open", groups=8, length=1000),
    Form("one document a row", documents=None),
    Form("tiny documents", documents=(1, 9), length=512),
    Form("window of 100", window=100),
    Form("window of 300, one document", window=300, documents=None),
    Form("soft cap", softcap=20.0, width=256, groups=4),
    Form("soft cap, window", softcap=20.0, width=256, groups=4, window=200),
    Form("ALiBi", alibi=True, groups=8, width=80),
    Form("ALiBi, one document", alibi=True, groups=8, width=80, documents=None),
    Form("9 heads on 3", heads=9, groups=3, width=64),
    *(
        Form(f"width {width}", kind, width=width)
        for kind in KINDS
        for width in (16, 64, 80, 96, 128, 256)
        if (kind, width) != ("bf16", 128)
    ),
    Form("ALiBi", "fp32", alibi=True, groups=8, width=80),
    Form("soft cap, window", "fp32", softcap=20.0, groups=4, width=256, window=200),
]
QUICK = (0, 1, 4, 7, 8, 13)
LENGTHS = (1024, 1000, 648)


def bounds_of(form: Form, seed: int) -> tuple[tuple[int, ...], ...]:
    """Returns ends of random documents that fill the rows."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(form.rows):
        ends = [0]
        while form.documents is not None and ends[-1] < form.length:
            low, high = form.documents
            size = int(torch.randint(low, high + 1, (), generator=generator))
            ends.append(min(ends[-1] + size, form.length))
        found.append(tuple(ends) if len(ends) > 1 else (0, form.length))
    return tuple(found)


def slopes(form: Form) -> Tensor | None:
    """Returns ALiBi's slopes, float32 [H]."""
    if not form.alibi:
        return None
    return 2.0 ** (-8.0 * torch.arange(1, form.heads + 1, device=DEVICE) / form.heads)


def dense(form: Form, document_RL: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with all scores, products in the inputs' dtype, softmax at least in float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(form.heads // form.groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(wide) / math.sqrt(form.width)
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    place = torch.arange(form.length, device=DEVICE)
    apart = place[:, None] - place[None, :]
    slope_H = slopes(form)
    if slope_H is not None:
        scores = scores - slope_H.to(wide)[:, None, None] * apart
    seen = (document_RL[:, :, None] == document_RL[:, None, :]) & (apart >= 0)
    if form.window is not None:
        seen = seen & (apart < form.window)
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def tensors(form: Form) -> list[Tensor]:
    """Returns queries, keys, values as a layer has them, and the output's gradient."""
    generator = torch.Generator(device=DEVICE).manual_seed(3)
    return [
        torch.randn(
            form.rows, form.length, count, form.width, device=DEVICE, generator=generator
        ).to(KINDS[form.kind])
        for count in (form.heads, form.groups, form.groups, form.heads)
    ]


def run(function: Callable[..., Tensor], given: Sequence[Tensor], dtype: torch.dtype) -> list[Any]:
    """Returns output and the three gradients in float64."""
    q, k, v = (x.to(dtype).requires_grad_() for x in given[:3])
    out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    found = torch.autograd.grad(out, (q, k, v), given[3].to(dtype))
    return [x.detach().double() for x in (out, *found)]


def judge(form: Form) -> dict[str, Any]:
    """Compares one form with the truth; also on a second batch of other documents."""
    given = tensors(form)
    worst: dict[str, float] = {}
    passed = True
    for seed in (0, 1):
        bounds = bounds_of(form, seed)
        document_RL = document_numbers(bounds, DEVICE)
        blocks = document_blocks(document_RL, form.window)

        def ours(q: Tensor, k: Tensor, v: Tensor, blocks: Any = blocks) -> Tensor:
            return flex_document_attention(
                q, k, v, blocks, scale=1 / math.sqrt(form.width), softcap=form.softcap,
                slopes_H=slopes(form),
            )  # fmt: skip

        def plain(q: Tensor, k: Tensor, v: Tensor, document_RL: Tensor = document_RL) -> Tensor:
            return dense(form, document_RL, q, k, v)

        truth = run(plain, given, torch.float64)
        eager = run(plain, given, KINDS[form.kind])
        mine = run(ours, given, KINDS[form.kind])
        names = ("out", "dq", "dk", "dv")
        for name, one, other, right in zip(names, mine, eager, truth, strict=True):
            size = float(right.norm()) or 1.0
            far, eagers = (float((x - right).norm()) / size for x in (one, other))
            passed &= bool(math.isfinite(far)) and far <= 2 * eagers + SLACK
            worst[name] = max(worst.get(name, 0.0), far / max(eagers, SLACK))
    return {"passed": passed, **worst}


def check(forms: Sequence[Form], *, alone: bool = True) -> list[dict[str, Any]]:
    """Judges forms and prints a line for each.

    Args:
        forms: What is judged.
        alone: Whether each is compiled by itself, with shapes of its own as in a compiled block;
            if not, the second of two lengths makes one graph for any length.
    """
    rows = []
    for form in forms:
        if alone:
            torch._dynamo.reset()
        label = f"{form.kind} {form.name}: {form.heads}/{form.groups} x {form.width}"
        started = time.perf_counter()
        try:
            row = judge(form)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            row = {"passed": False, "error": f"{type(error).__name__}: {text}"}
        seconds = time.perf_counter() - started
        shown = row.get("error") or " ".join(f"{k} {row[k]:.2f}" for k in ("out", "dq", "dk", "dv"))
        print(
            f"{'ok  ' if row['passed'] else 'FAIL'} {label}: {shown} ({seconds:.1f} s)", flush=True
        )
        rows.append({"form": label, **row})
        torch.cuda.empty_cache()
    return rows


def milliseconds(action: Callable[[], object], count: int = 20) -> float:
    """Returns the median time of an action on the device."""
    for _ in range(5):
        action()
    found = []
    for _ in range(count):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
        start.record()
        action()
        end.record()
        end.synchronize()
        found.append(float(start.elapsed_time(end)))
    return statistics.median(found)


def clock(name: str, function: Callable[..., Tensor], form: Form) -> dict[str, Any]:
    """Times forward and backward of one form and prints them."""
    torch._dynamo.reset()
    try:
        q, k, v, grad = tensors(form)
        q, k, v = (x.transpose(1, 2).requires_grad_() for x in (q, k, v))
        forward = milliseconds(lambda: function(q, k, v))
        out = function(q, k, v)
        grad = grad.view(out.shape)
        backward = milliseconds(
            lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        )
    except Exception as error:
        print(f"     {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return {"form": name, "error": str(error)[:200]}
    print(f"     {name}: forward {forward:.3f} ms, backward {backward:.3f} ms", flush=True)
    return {"form": name, "forward_ms": forward, "backward_ms": backward}


def times() -> list[dict[str, Any]]:
    """Times the forms that models use, at 8,192 tokens."""
    rows = []
    llama = Form("llama", heads=32, groups=8, rows=4, length=2048)
    one = Form("llama", heads=32, groups=8, rows=1, length=8192)
    mine: list[tuple[str, Form]] = [
        ("flex packed 4 x 2,048", llama),
        ("flex packed 1 x 8,192", one),
        ("flex one document 4 x 2,048", Form("", heads=32, groups=8, rows=4, length=2048,
                                             documents=None)),
        ("flex window 1,024, one document 1 x 8,192", Form(
            "", heads=32, groups=8, rows=1, length=8192, documents=None, window=1024)),
        ("flex soft cap 8/4 x 256, packed 4 x 2,048", Form(
            "", heads=8, groups=4, width=256, rows=4, length=2048, softcap=50.0)),
        ("flex ALiBi 32 x 80, one document 8 x 1,024", Form(
            "", heads=32, groups=32, width=80, rows=8, length=1024, documents=None, alibi=True)),
        ("flex ALiBi 32 x 80, packed 8 x 1,024", Form(
            "", heads=32, groups=32, width=80, rows=8, length=1024, alibi=True)),
    ]  # fmt: skip
    for name, form in mine:
        blocks = document_blocks(document_numbers(bounds_of(form, 0), DEVICE), form.window)
        slope_H = slopes(form)

        def ours(
            q: Tensor, k: Tensor, v: Tensor, form: Form = form, blocks: Any = blocks,
            slope_H: Tensor | None = slope_H,
        ) -> Tensor:  # fmt: skip
            return flex_document_attention(
                q, k, v, blocks, scale=1 / math.sqrt(form.width), softcap=form.softcap,
                slopes_H=slope_H,
            )  # fmt: skip

        rows.append(clock(name, ours, form))

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return out.transpose(1, 2)

    rows.append(clock("sdpa causal 4 x 2,048, torch's choice", causal, llama))
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            rows.append(clock(f"sdpa causal 4 x 2,048, {backend.name}", causal, llama))
    bloom = Form("", heads=32, groups=32, width=80, rows=8, length=1024, alibi=True)
    zeros = torch.zeros(8, 1024, dtype=torch.int32, device=DEVICE)
    rows.append(
        clock("dense ALiBi 32 x 80, 8 x 1,024", lambda q, k, v: dense(bloom, zeros, q, k, v), bloom)
    )
    return rows


def waits() -> dict[str, Any]:
    """Builds blocks and attends under torch's watch for synchronisation; times the building."""
    form = Form("", heads=32, groups=8, rows=4, length=2048)
    q, k, v, _ = (x.transpose(1, 2) for x in tensors(form))

    def step(seed: int) -> None:
        full, narrow = packed_blocks(bounds_of(form, seed), DEVICE, window=1024)
        for blocks in (full, narrow):
            assert blocks is not None
            flex_document_attention(q, k, v, blocks, scale=0.1)

    torch._dynamo.reset()
    step(0)
    torch.cuda.synchronize()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(1, 6):
            step(seed)
        waited = ""
    except RuntimeError as error:
        waited = str(error)[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    bounds = bounds_of(form, 0)
    host = time.perf_counter()
    for _ in range(20):
        packed_blocks(bounds, DEVICE)
    host = (time.perf_counter() - host) / 20 * 1e3
    device = milliseconds(lambda: packed_blocks(bounds, DEVICE))
    passed = not waited and again == 0
    print(
        f"{'ok  ' if passed else 'FAIL'} other documents: {again} graphs more, "
        f"{waited or 'the host waits for nothing'}; blocks of 4 x 2,048: host {host:.2f} ms, "
        f"device {device:.2f} ms",
        flush=True,
    )
    return {"form": "waits", "passed": passed, "host_ms": host, "device_ms": device}


def main() -> int:
    """Runs what was asked; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="six forms and no times")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    forms = [FORMS[index] for index in QUICK] if args.quick else FORMS
    rows = check(forms)
    torch._dynamo.reset()
    rows += check([Form(f"length {n}", length=n) for n in LENGTHS], alone=False)
    rows.append(waits())
    clocks = [] if args.quick else times()
    failed = [row["form"] for row in rows if not row["passed"]]
    record = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": rows}
    print(f"{len(rows) - len(failed)} of {len(rows)} passed")
    print("RESULT " + json.dumps({**record, "times": clocks, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
