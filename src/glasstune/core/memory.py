"""What the operating system says of this process's memory, and errors that mean there is none."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress


def peak_resident_bytes() -> int:
    """Returns the largest resident memory of this process so far."""
    # Linux: `ru_maxrss` starts with what the parent held at the fork, VmHWM does not.
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


_SAYS = (
    "DefaultCPUAllocator", "CUDA out of memory", "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory is short.

    torch has a class for it on a GPU alone; it is known by name here, so that nothing is imported.
    """
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _SAYS):
            return True
        error = error.__cause__
    return False
