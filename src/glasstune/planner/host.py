"""A CPU's memory: what the process holds before, what loading leaves, what its allocator loses."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasstune.core.tensors import tensor_shapes
from glasstune.planner.model import MemoryModel

HOLES = {True: 0.72, False: 0.5}
"""Free pieces of glibc's heap that training cannot use again, as a share of its activations: where
updates are audited (hooks make more small objects) and where not.

Calibrated: torch takes tensors by `posix_memalign`, whose ends hold small objects of the graph, so
a freed piece no longer holds a tensor of the size it had. From the resident peak of whole training
runs of SmolLM2-135M at 16 bit (glibc 2.36, torch 2.13): 0.77 at 4 x 128 and 0.76 at 4 x 512 tokens
audited, 0.52 at 4 x 512 not audited; bare steps lost 0.41 to 0.47 (`mallinfo2`).
"""


@dataclass(frozen=True)
class Host:
    """What a CPU run holds beside its tensors.

    Args:
        context: Bytes resident before the model is loaded: Python, libraries, data.
        mapped: Bytes of weight files that stay mapped although their weights are stored anew.
        packed_head: Bytes of the widest weight, which a bfloat16 product packs anew.
    """

    context: int
    mapped: int
    packed_head: int


def host_of(model: MemoryModel) -> Host:
    """Measures this process, and works out what loading will add."""
    setup = model.setup
    mapped = 0
    if setup.bits < 16 and setup.source.weights is not None:
        mapped = _kept_mapped(setup.source.weights, setup.dtype)
    head: Any = model.shadow.model.get_base_model().get_output_embeddings()
    return Host(
        context=resident_bytes(),
        mapped=mapped,
        packed_head=head.weight.numel() * head.weight.element_size(),
    )


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
