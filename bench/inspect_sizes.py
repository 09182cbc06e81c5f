"""Time and memory of laying out Llama-3-70B at 16, 8 and 4 bit from its config alone.

    python bench/inspect_sizes.py [CONFIG.json] [--repeat N]

Imports are made before the clock starts; peak memory is the process's, imports included.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

LLAMA = Path(__file__).parents[1] / "tests" / "support" / "configs" / "llama-3-70b.json"
BITS = (16, 8, 4)
LIMIT_SECONDS = 10.0
LIMIT_BYTES = 2 * 10**9


def measure(config: Path) -> tuple[float, dict[int, int]]:
    """Returns seconds and total bytes by precision."""
    from glasstune.models.inspect.precision import precision_record
    from glasstune.models.inspect.source import open_source

    start = time.perf_counter()
    source = open_source(str(config))
    totals = {}
    for bits in BITS:
        record = precision_record(source, bits)
        record.to_dict()
        totals[bits] = record.total_bytes
    return time.perf_counter() - start, totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("config", nargs="?", type=Path, default=LLAMA)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()

    import torch
    import transformers

    from glasstune.core.memory import peak_resident_bytes
    from glasstune.models.inspect import precision  # noqa: F401
    from glasstune.models.quiet import quiet_transformers

    with quiet_transformers():
        import bitsandbytes  # noqa: F401

    torch.set_num_threads(1)
    runs = [measure(arguments.config) for _ in range(arguments.repeat)]
    peak = peak_resident_bytes()
    totals = runs[0][1]
    print(f"{arguments.config.stem}, torch {torch.__version__}, transformers", end=" ")
    print(f"{transformers.__version__}, 1 thread")
    print("bytes:", ", ".join(f"{bits} bit {totals[bits]:,}" for bits in BITS))
    print("seconds:", ", ".join(f"{seconds:.2f}" for seconds, _ in runs), "(the first is cold)")
    print(f"peak memory of the process: {peak / 1e9:.2f} GB")
    if runs[0][0] > LIMIT_SECONDS or peak > LIMIT_BYTES:
        raise SystemExit(f"over {LIMIT_SECONDS:.0f} s or {LIMIT_BYTES / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
