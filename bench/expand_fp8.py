"""How fast packed weights are expanded to float8 on a GPU, by rows and by columns.

    python bench/expand_fp8.py
    python bench/expand_fp8.py --rows 4096 --width 14336

Weights are random and made on the device. The last line printed is `RESULT {json}`: milliseconds
of the expansion to float8 and, beside it, of the one to bfloat16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from glasstune.kernels.expand import Fp8Packed, Packed4bit, PackedInt8, weight_scales
from glasstune.kernels.lora_group import Layout


def packed_4bit(rows: int, width: int) -> Packed4bit:
    """Returns an NF4 weight with double quantisation."""
    from bitsandbytes import functional

    weight = torch.randn(rows, width, device="cuda") * 0.03
    data, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    deeper = state.state2
    return Packed4bit(
        [data], [state.absmax], [deeper.code], [deeper.absmax], [state.offset], state.code, 64
    )


def packed_int8(rows: int, width: int) -> PackedInt8:
    """Returns an int8 weight."""
    quantized = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device="cuda")
    return PackedInt8([quantized], [torch.rand(rows, device="cuda") * 0.1 + 0.01])


def milliseconds(run: Callable[[], object], count: int = 30) -> float:
    """Returns the median of `count` runs."""
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[count // 2]


def measure(packed: Any, layout: Layout) -> dict[str, float]:
    """Returns milliseconds by name."""
    source = Fp8Packed(packed, layout.outs, *weight_scales(packed, layout))
    runs: dict[str, Callable[[], object]] = {
        "by rows": lambda: source.expand(False, []),
        "by columns": lambda: source.expand(True, []),
        "bfloat16": lambda: packed.expand(layout, [], [], torch.bfloat16, []),
        "scales": lambda: weight_scales(packed, layout),
    }
    return {name: round(milliseconds(run), 4) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=28672)
    parser.add_argument("--width", type=int, default=4096)
    args = parser.parse_args()
    layout = Layout(args.width, (args.rows,), (), ())
    found = {
        "rows": args.rows, "width": args.width, "card": torch.cuda.get_device_name(),
        "4 bit": measure(packed_4bit(args.rows, args.width), layout),
        "8 bit": measure(packed_int8(args.rows, args.width), layout),
    }  # fmt: skip
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
