"""Seconds of an update before there is one: operations over the device's own rate."""

from __future__ import annotations

import time

import torch

PROBE_SECONDS = 0.2
PROBE_BYTES = 2**27

SHARE = {("cuda", True): 0.75, ("cuda", False): 0.45, ("cpu", True): 0.5, ("cpu", False): 0.5}
"""Share of a product's rate that a whole step reaches, by device and whether blocks are compiled.

Calibrated: on an H100 a step of the shape of Llama-3-8B takes 498 ms compiled, of which products
and attention at their own rate would take 388; plain PEFT took twice that. On a CPU,
roughly: SmolLM2-135M reached 0.5 to 0.7 (2 cores).
"""

LAUNCH_TOKENS = {"cuda": 256, "cpu": 16}
"""Tokens whose work takes as long as launching a forward's operations (rough)."""


def probe_rate(device: torch.device, width: int, rows: int, dtype: torch.dtype) -> float:
    """Measures products of the model's own width for a moment.

    Args:
        device: Where the run will be.
        width: Inner size of the product.
        rows: Tokens of a forward, cut to 4,096.
        dtype: Type of the products.

    Returns:
        Floating point operations a second.
    """
    rows = max(16, min(rows, 4096))
    x = torch.ones(rows, width, device=device, dtype=dtype)
    weight = torch.ones(width, 4 * width if width < 8192 else width, device=device, dtype=dtype)
    once = 2 * rows * weight.numel()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad():
        for _ in range(2):
            x @ weight
        wait()
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < PROBE_SECONDS:
            for _ in range(4 if device.type == "cuda" else 1):
                x @ weight
                count += 1
            wait()
        seconds = time.perf_counter() - started
    return count * once / seconds


def probe_bandwidth(device: torch.device) -> float:
    """Returns the bytes a second that a copy within the device's memory moves, both ways counted.

    Args:
        device: Where the run will be.
    """
    source = torch.ones(PROBE_BYTES, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    target.copy_(source)
    wait()
    started, count = time.perf_counter(), 10
    for _ in range(count):
        target.copy_(source)
    wait()
    return 2 * count * PROBE_BYTES / (time.perf_counter() - started)


def forward_seconds(
    flops: int, tokens: int, rate: float, device: str, compiled: bool, again: float = 0.0,
    float8: int = 0,
) -> float:  # fmt: skip
    """Returns the seconds of a forward and backward.

    Args:
        flops: Operations of its products and attention, recomputation included.
        tokens: Of the forward.
        rate: Of products, see `probe_rate`.
        device: `cpu` or `cuda`.
        compiled: Whether blocks are compiled.
        again: Seconds of memory traffic for what is made again although it is no product.
        float8: Those of `flops` that are of float8 products, counted there as half: what a step
            does beside its products takes as long as with bfloat16 ones. Emulated ones are not
            halved.
    """
    share = SHARE[device, compiled]
    beside = float8 * (1 / share - 1) if device == "cuda" else float8 / share
    full = again + (flops / share + beside) / rate
    return full * (1 + LAUNCH_TOKENS[device] / max(1, tokens))
