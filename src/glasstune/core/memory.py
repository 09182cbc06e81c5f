"""What the operating system says of this process's memory."""

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
