"""A CPU's memory: what the process holds before, what loading leaves, what its allocator loses."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasstune.core.tensors import tensor_shapes
from glasstune.planner.model import MemoryModel

HOLES = 0.43
"""Free pieces of glibc's heap that training cannot use again, as a share of its activations.

Calibrated: torch takes tensors by `posix_memalign`, whose ends hold small objects of the graph, so
a freed piece no longer holds a tensor of the size it had. Read from `mallinfo2` at the end of a
forward of SmolLM2-135M (glibc 2.36, torch 2.13): 0.47, 0.43, 0.41, 0.43 and 0.41 of the activations
at 4 x 512, 4 x 128, 1 x 488, 8 x 512 tokens (16 bit) and 2 x 512 (8 bit).
"""

LEFT_BY_4BIT = 0.85
"""What packing weights to 4 bit leaves in the heap and training does not use again, as a share of
the weights at 16 bit. Calibrated: 125 and 221 MiB of 202 MiB were lost with SmolLM2-135M at 4 x 128
and 4 x 512 tokens."""


@dataclass(frozen=True)
class Host:
    """What a CPU run holds beside its tensors.

    Args:
        context: Bytes resident before the model is loaded: Python, libraries, data.
        mapped: Bytes of weight files that stay mapped although their weights are stored anew.
        left: Bytes that loading leaves in the heap.
        packed_head: Bytes of the widest weight, which a bfloat16 product packs anew.
    """

    context: int
    mapped: int
    left: int
    packed_head: int


def host_of(model: MemoryModel) -> Host:
    """Measures this process, and works out what loading will add."""
    setup = model.setup
    bf16 = sum(
        2 * module.in_features * module.out_features
        for path, module in _quantised(model.shadow.model)
        for _ in range(model.times(path))
    )
    mapped = 0
    if setup.bits < 16 and setup.source.weights is not None:
        mapped = _kept_mapped(setup.source.weights, setup.dtype)
    head: Any = model.shadow.model.get_base_model().get_output_embeddings()
    return Host(
        context=resident_bytes(),
        mapped=mapped,
        left=round(LEFT_BY_4BIT * bf16) if setup.bits == 4 else 0,
        packed_head=head.weight.numel() * head.weight.element_size(),
    )


def _quantised(model: Any) -> list[tuple[str, Any]]:
    kinds = ("Linear4bit", "Linear8bitLt", "Int8Linear")
    return [
        (path, part)
        for path, part in model.named_modules()
        if type(part).__name__ in kinds and not hasattr(part, "base_layer")
    ]


def _kept_mapped(folder: Path, dtype: str) -> int:
    """Bytes of weight files beside the base: a weight that is left as it is holds its whole file.

    Weights of another type are copied, and then nothing holds the file.
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        kinds = {kind for _, kind in tensor_shapes(file).values()}
        if {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(dtype) in kinds:
            total += file.stat().st_size
    return total


def resident_bytes() -> int:
    """Returns the memory of this process that is in RAM."""
    if sys.platform != "linux":
        return 0
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Returns what this process may still take: free memory, or what a container leaves."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        inactive = _inactive_file(group / "memory.stat")
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used + inactive))


def _inactive_file(stat: Path) -> int:
    for line in stat.read_text(encoding="ascii").splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
