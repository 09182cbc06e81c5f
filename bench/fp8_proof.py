"""Does training on a float8 base end where training on bfloat16 does? Whole runs on real data.

    python bench/fp8_proof.py MODEL DATA.json [DATA.json ...] --csv proof.csv
    python bench/fp8_proof.py MODEL DATA.json --ways bf16 fp8 --seeds 0 --steps 20 --csv try.csv
    python bench/fp8_proof.py --markdown proof.csv more.csv

Each run is `glasstune train` in a process of its own; all runs train on the same rows in an order
of their seed and are measured on the same held-out rows (every 20th row of each file). `--parallel`
runs share the card: losses are compared here, not times.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WAYS = {
    "bf16": ["model.bits=16"],
    "fp8": ["model.bits=16", "training.compute=fp8"],
    "4 bit": ["model.bits=4"],
    "4 bit, fp8": ["model.bits=4", "training.compute=fp8"],
}
COLUMNS = [
    "way", "seed", "steps", "before", "after", "best", "in_bf16", "train_loss",
    "tokens_per_second", "peak_bytes", "graphs", "seconds", "note",
]  # fmt: skip
HELD_OUT = 20


def split(files: list[Path], folder: Path) -> tuple[list[Path], list[Path]]:
    """Writes rows for training and held-out rows of each file."""
    trained: list[Path] = []
    held: list[Path] = []
    for file in files:
        rows = json.loads(file.read_text(encoding="utf-8"))
        for name, part, out in (
            ("train", [row for i, row in enumerate(rows) if i % HELD_OUT], trained),
            ("held", rows[::HELD_OUT], held),
        ):
            path = folder / f"{file.stem}-{name}.json"
            path.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
            out.append(path)
    return trained, held


def run(args: argparse.Namespace, way: str, seed: int, folder: Path, files: Any) -> dict[str, Any]:
    """Trains once; returns its row."""
    output = folder / f"{way}-{seed}".replace(" ", "").replace(",", "-")
    trained, held = files
    config = {
        "model": {"path": str(args.model)},
        "data": {
            "sources": [{"path": str(path)} for path in trained],
            "validation": [{"path": str(path)} for path in held],
            "max_length": args.length, "truncation": "cut",
        },
        "training": {
            "output_dir": str(output), "max_steps": args.steps, "train_batch_size": args.batch,
            "per_device_train_batch_size": args.batch, "learning_rate": args.rate, "seed": seed,
            "eval_steps": args.steps, "recompute": "none",
        },
        "audit": {"every_n_steps": 0},
    }  # fmt: skip
    file = folder / f"{output.name}.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "glasstune", "train", str(file), *WAYS[way], *args.more]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"way": way, "seed": seed, "steps": args.steps}
    row["seconds"] = round(time.monotonic() - start, 1)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return row | {"note": " | ".join(lines[-3:])[:400]}
    events = [json.loads(line) for line in (output / "metrics.jsonl").open(encoding="utf-8")]
    losses = [event["eval_loss"] for event in events if event["event"] == "eval"]
    steps = [event for event in events if event["event"] == "train"]
    late = steps[len(steps) // 2 :]
    choices = json.loads((output / "run.json").read_text(encoding="utf-8"))["choices"]
    graphs = [c["value"] for c in choices if c["name"] == "training.cuda_graphs"]
    return row | {
        "in_bf16": evaluate(output, held), "graphs": graphs[-1] if graphs else "",
        "before": losses[0], "after": losses[-1], "best": min(losses),
        "train_loss": statistics.mean(event["loss"] for event in late),
        "tokens_per_second": round(statistics.median(e["tokens_per_second"] for e in late)),
        "peak_bytes": max(event["peak_memory_bytes"] or 0 for event in steps),
    }  # fmt: skip


def evaluate(output: Path, held: list[Path]) -> float:
    """Returns the loss of a run's adapter on the same base with bfloat16 products."""
    program = [sys.executable, "-m", "glasstune", "evaluate", str(output)]
    files = [output / f"{path.stem}.json" for path in held]
    started = [
        subprocess.Popen(
            [*program, "--data", str(path), "--json", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for path, file in zip(held, files, strict=True)
    ]
    codes = [process.wait() for process in started]  # all of them, also after a failure
    if any(codes):
        return float("nan")
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    tokens = sum(record["tokens"] for record in found)
    return float(sum(record["eval_loss"] * record["tokens"] for record in found) / tokens)


def table(files: list[Path]) -> str:
    """Returns the runs as a Markdown table, seeds side by side."""
    rows: list[dict[str, str]] = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            rows += csv.DictReader(lines)
    text = []
    for column, what in (("after", "as trained"), ("in_bf16", "adapter on bfloat16 products")):
        good = [row for row in rows if row[column]]
        seeds = sorted({row["seed"] for row in good}, key=int)
        names = " | ".join(f"seed {seed}" for seed in seeds)
        text += [f"\n| {what} | {names} | mean | spread |", "|---" * (len(seeds) + 3) + "|"]
        for way in WAYS:
            found = {row["seed"]: float(row[column]) for row in good if row["way"] == way}
            if not found:
                continue
            cells = [f"{found[seed]:.4f}" if seed in found else "" for seed in seeds]
            values = list(found.values())
            cells += [f"{statistics.mean(values):.4f}", f"{max(values) - min(values):.4f}"]
            text.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="*")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=2, help="packs of an update")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--more", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="CSV")
    args = parser.parse_args(argv)
    if args.markdown:
        print(table(args.markdown))
        return 0
    if args.model is None or not args.data or args.csv is None:
        parser.error("give MODEL, DATA and --csv FILE")
    with tempfile.TemporaryDirectory() as name, args.csv.open("w", newline="") as file:
        folder = Path(name)
        files = split(args.data, folder)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        cases = [(way, seed) for seed in args.seeds for way in args.ways]
        with ThreadPoolExecutor(args.parallel) as pool:
            waiting = [pool.submit(run, args, *case, folder, files) for case in cases]
            for future in waiting:
                row = future.result()
                writer.writerow(row)
                file.flush()
                print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
