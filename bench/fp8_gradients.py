"""Gradients of every adapter tensor under float8 products, against bfloat16 and float32.

One model, one adapter (B is drawn, since A has no gradient while B is zero), one update's rows:

    python bench/fp8_gradients.py MODEL ROWS [--bits 16] [--rows 8] [--json out.json]

On a CPU the products are emulated. Layers are grouped as on a GPU, so LoRA is inside the product.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.fast.speed_up import speed_up
from glasstune.reports.terminal import RichProgress
from glasstune.training.batching import updates
from glasstune.training.step import compute_update
from glasstune.workflows.prepare_run import prepare
from glasstune.workflows.trained_model import open_trained

WAYS = {
    "float32": ({"dtype": "float32"}, {}),
    "bf16": ({"dtype": "bfloat16"}, {}),
    "fp8": ({"dtype": "bfloat16"}, {"compute": "fp8", "fp8_keep": []}),
}


def gradients(args: argparse.Namespace, way: str, folder: str) -> tuple[dict[str, Tensor], float]:
    """Returns the gradient of each adapter tensor in float32, and the update's loss."""
    model, training = WAYS[way]
    config = Config(
        model={"path": args.model, "bits": args.bits, **model},
        adapter={"r": 16, "lora_alpha": 32},
        data={"sources": [{"path": args.data}], "max_length": 512, "packing": False,
              "validation_split": 0},
        training={"output_dir": folder, "train_batch_size": args.rows, "seed": 0,
                  "compile": False, "recompute": "none", **training},
    )  # fmt: skip
    progress, choices = RichProgress(), Choices()
    started = time.monotonic()
    prepared = prepare(config, choices, progress)
    adapted, parameters, _ = open_trained(prepared, lambda finding: None)
    if way != "float32" and adapted.speed is None:  # as it is on a GPU
        adapted.speed = speed_up(adapted.model, compile=False, choices=choices)
        ways = sorted({(m.way, m.reason) for m in adapted.speed.record.modules})
        progress.say(f"{way}: {ways}")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in parameters.items():
            if "lora_B" in name:
                drawn = torch.randn(value.shape, generator=draw) * args.size
                value.copy_(drawn)
    stream = updates(
        prepared.schedule, prepared.data.train, 0, 0, 0, config.data.num_workers, prepared.pad_id
    )
    update = next(iter(stream))
    adapted.model.train()
    result = compute_update(adapted, prepared.terms, update.micro_batches, 1, 0)
    assert result is not None
    found = {
        name: value.grad.detach().float().cpu().clone()
        for name, value in parameters.items()
        if value.grad is not None
    }
    seconds = time.monotonic() - started
    progress.say(f"{way}: loss {result.loss:.5f}, {result.tokens} tokens, {seconds:.0f} s")
    adapted.slow_down()
    progress.close()
    return found, result.loss


def compare(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Returns cosine and relative distance of each tensor."""
    assert got.keys() == want.keys()
    found = {}
    for name, one in got.items():
        a, b = one.double().flatten(), want[name].double().flatten()
        found[name] = (float(a @ b / (a.norm() * b.norm())), float((a - b).norm() / b.norm()))
    return found


def kind(name: str) -> str:
    """`model.layers.3.mlp.up_proj.lora_A.default.weight` to `up_proj A`."""
    path, factor = name.split(".lora_")
    return f"{path.rsplit('.', 1)[-1]} {factor[0]}"


def table(pairs: dict[str, dict[str, tuple[float, float]]]) -> list[str]:
    """Returns rows of Markdown: by kind, median and worst of both numbers, for each pair."""
    names = next(iter(pairs.values()))
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind(name), []).append(name)
    lines = ["| tensors | pair | cosine, median | least | distance, median | largest | worst |"]
    lines.append("|---|---|---|---|---|---|---|")
    for label, members in [*kinds.items(), ("all", list(names))]:
        for pair, found in pairs.items():
            cosines = [found[name][0] for name in members]
            off = [found[name][1] for name in members]
            worst = members[off.index(max(off))]
            lines.append(
                f"| {label} ({len(members)}) | {pair} | {median(cosines):.5f} | "
                f"{min(cosines):.5f} | {median(off):.4f} | {max(off):.4f} | {short(worst)} |"
            )
    return lines


def short(name: str) -> str:
    """Returns a tensor's name without what all have."""
    return name.removeprefix("base_model.model.model.").removesuffix(".default.weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--size", type=float, default=0.01, help="standard deviation of B")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    losses: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        for way in WAYS:
            found[way], losses[way] = gradients(args, way, folder)
            gc.collect()
    pairs = {
        "fp8 / bf16": compare(found["fp8"], found["bf16"]),
        "fp8 / float32": compare(found["fp8"], found["float32"]),
        "bf16 / float32": compare(found["bf16"], found["float32"]),
    }
    print("\n".join(table(pairs)))
    print("losses", losses)
    if args.json is not None:
        args.json.write_text(json.dumps({"losses": losses, "pairs": pairs}))


if __name__ == "__main__":
    main()
