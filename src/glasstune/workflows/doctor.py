"""`glasstune doctor`: what this machine has, and what works on it, found by trying."""

from __future__ import annotations

import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from glasstune.core.findings import Finding
from glasstune.core.protocols import Progress
from glasstune.core.records import Check, DoctorRecord

_PACKAGES = (
    "glasstune",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "triton",
)

# Bytes a parameter of the base takes: NF4 with double quantisation needs 4.127 bits.
_BYTES = {16: 2.0, 8: 1.01, 4: 0.52}
_FOR_WEIGHTS = 0.7
"""Share of the free memory that weights may take; activations need the rest (rough)."""


def doctor(*, compile: bool = True, progress: Progress | None = None) -> DoctorRecord:
    """Looks at the machine and tries small operations on it.

    Args:
        compile: Whether torch.compile is tried (some seconds).
        progress: Where each try is said.

    Returns:
        Device, versions, memory, disk, what works, and how large a base model fits.
    """
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = _device(kind)
    checks: dict[str, Check] = {}
    for name, probe in _probes(kind, compile).items():
        if progress is not None:
            progress.say(f"trying {name}")
        checks[name] = _try(probe)
    folder = Path.cwd()
    return DoctorRecord(
        device=device,
        python=platform.python_version(),
        versions=_versions(),
        disk={"path": str(folder), "free_bytes": shutil.disk_usage(folder).free},
        checks=checks,
        fits_parameters={
            str(bits): device["free_bytes"] * _FOR_WEIGHTS / size for bits, size in _BYTES.items()
        },
        findings=_findings(kind, checks),
    )


def _probes(kind: str, compile: bool) -> dict[str, Callable[[], Check]]:
    from glasstune.fast.probe import compiler_found, try_compile
    from glasstune.models.probe import try_quantized_layer

    def quantized(bits: int) -> Check:
        off = try_quantized_layer(bits, kind)
        return Check("works", f"forward and backward, outputs within {off:.1%}")

    def compiled() -> Check:
        compiler = compiler_found()
        if kind == "cpu" and compiler is None:
            return Check("missing", "needs a C++ compiler: install g++")
        seconds = try_compile(kind)
        with_what = f" with {compiler}" if kind == "cpu" else ""
        return Check("works", f"compiled{with_what} in {seconds:.1f} s")

    probes: dict[str, Callable[[], Check]] = {
        "float32": lambda: _product(kind, "float32"),
        "bfloat16": lambda: _product(kind, "bfloat16"),
        "float16": lambda: _product(kind, "float16"),
        "8 bit (w8a16)": lambda: _int8(kind),
        "8 bit (llm_int8)": lambda: quantized(8),
        "4 bit (NF4)": lambda: quantized(4),
        "fp8": lambda: _fp8(kind),
    }
    if compile:
        probes["torch.compile"] = compiled
    return probes


def _try(probe: Callable[[], Check]) -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe()
    except Exception as error:  # a failing operation is this command's result
        text = " ".join(str(error).split())
        missing = isinstance(error, ImportError)
        return Check("missing" if missing else "fails", f"{type(error).__name__}: {text}"[:200])


def _product(kind: str, dtype_name: str, size: int = 512) -> Check:
    import torch

    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator)
    b = torch.randn(size, size, generator=generator)
    left, right = a.to(kind, dtype), b.to(kind, dtype)
    got = left @ right
    best = float("inf")
    for _ in range(3):
        _wait(kind)
        started = time.perf_counter()
        left @ right
        _wait(kind)
        best = min(best, time.perf_counter() - started)
    truth = a @ b
    off = float((got.float().cpu() - truth).abs().max() / truth.abs().max())
    speed = 2 * size**3 / best / 1e12
    detail = f"{speed:.3g} TFLOP/s, outputs within {off:.1e}"
    return Check("works" if off < 0.02 else "fails", detail)


def _int8(kind: str) -> Check:
    import torch

    from glasstune.kernels.int8_linear.op import int8_linear
    from glasstune.kernels.int8_linear.reference import quantize_rows

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    x = torch.randn(4, 64, generator=generator)
    quantized, scale = quantize_rows(weight)
    got = int8_linear(x.to(kind, torch.bfloat16), quantized.to(kind), scale.to(kind))
    truth = x @ weight.T
    off = float((got.float().cpu() - truth).abs().max() / truth.abs().max())
    return Check("works" if off < 0.05 else "fails", f"outputs within {off:.1%}")


def _fp8(kind: str) -> Check:
    import torch

    from glasstune.core.errors import InputError
    from glasstune.models.fp8 import check_device
    from glasstune.models.probe import try_fp8_layer

    try:
        check_device(torch.device(kind))
    except InputError as error:
        return Check("missing", f"{error.message}; {error.fix}")
    output, gradient = try_fp8_layer(kind)
    detail = f"rows with a scale each, outputs within {output:.1%}, gradients within {gradient:.1%}"
    if kind == "cpu":
        return Check("works", f"emulated, slower than bfloat16: {detail}")
    return Check("works", detail)


def _wait(kind: str) -> None:
    import torch

    if kind == "cuda":
        torch.cuda.synchronize()


def _device(kind: str) -> dict[str, Any]:
    import torch

    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        return {
            "kind": kind,
            "name": torch.cuda.get_device_name(),
            "count": torch.cuda.device_count(),
            "free_bytes": free,
            "total_bytes": total,
        }
    free, total = _memory()
    return {
        "kind": kind,
        "name": _processor(),
        "count": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "free_bytes": free,
        "total_bytes": total,
    }


def _memory() -> tuple[int, int]:
    """Returns (free, total) main memory in bytes, within the container's limit."""
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    total = pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else 0
    free = total
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    used = _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit))
        free = min(free, max(0, int(limit) - int(used)))
    return free, total


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _processor() -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _findings(kind: str, checks: dict[str, Check]) -> list[Finding]:
    findings = []
    if kind == "cpu":
        findings.append(
            Finding(
                "no_gpu",
                "info",
                "device",
                "torch sees no GPU: training runs on the CPU, which suits models below a billion "
                "parameters",
                "on a machine with a GPU install a CUDA build of torch and its driver",
            )
        )
    for name in ("4 bit (NF4)", "8 bit (llm_int8)"):
        if checks[name].status != "works":
            findings.append(
                Finding(
                    "bitsandbytes",
                    "warning",
                    name,
                    f"does not work here: {checks[name].detail}",
                    "8 bit as w8a16 needs no bitsandbytes; 16 bit always works",
                )
            )
    return findings
