"""Runs `gpu_step.py` and `gpu_peer.py` over a list of cases on one card; writes one CSV.

    python bench/gpu_table.py --csv step.csv --folder /tmp/llama8b bits4
    python bench/gpu_table.py --csv step.csv lengths
    python bench/gpu_table.py --markdown step.csv more.csv     # the tables of docs/BENCHMARKS.md

Each case is a process of its own. A case that fails is a row with its last line of output, so that
what ran out of memory is seen too. `floor_ms` is the card's floor at that shape (products of the
frozen base, attention and head, nothing else) where it was measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = [
    "model", "bits", "batch", "seq", "way", "budget", "recompute", "offload", "graph", "ms",
    "ms_min", "tokens_per_second", "peak_gib", "floor_ms", "to_floor", "losses", "note", "card",
    "versions",
]  # fmt: skip

# Bare bf16 products of base and head with attention on an H100 80GB (torch 2.11), milliseconds.
FLOORS = {
    ("llama8b", 4, 2048): 388,
    ("llama8b", 1, 8192): 472,
    ("llama8b", 1, 16384): 1170,
    ("llama8b", 1, 512): 29,
    ("bloom2b6", 8, 1024): 164,
}

# Ours: arguments of gpu_step.py. A peer: its name first. Suites are so cut that two cards of one
# host can each run half; what is compared stands in one suite, so on one card.
ROOM_22 = (  # what the plan chooses for 22 GiB; 4 x 2,048 stands with the 4-bit rows
    ("1", "8192", ["--recompute", "2", "--budget", "0.5"]),
    ("1", "16384", ["--recompute", "26", "--budget", "0.9"]),
)
SUITES: dict[str, list[list[str]]] = {
    "bits4": [
        ["--bits", "4", "--budget", "0.9"],
        ["--bits", "4", "--budget", "0.7"],
        ["unsloth", "--bits", "4", "--recompute", "0"],
        ["--bits", "4", "--recompute", "2", "--budget", "0.5"],
        ["--bits", "4", "--recompute", "-1", "--offload"],
        ["unsloth", "--bits", "4", "--recompute", "1"],
        ["hf", "--bits", "4", "--recompute", "1"],
        ["liger", "--bits", "4", "--recompute", "1"],
    ],
    "bits16": [
        ["--bits", "16"],
        ["--bits", "16", "--budget", "0.9"],
        ["--bits", "16", "--way", "compiled"],
        ["--bits", "8", "--budget", "0.9"],
        ["unsloth", "--bits", "16", "--recompute", "0"],
        ["unsloth", "--bits", "8", "--recompute", "1"],
        ["hf", "--bits", "16", "--recompute", "1"],
        ["liger", "--bits", "16", "--recompute", "0"],
        ["hf", "--bits", "8", "--recompute", "1"],
    ],
    "room22": [
        [*who, "--bits", "4", "--batch", batch, "--seq", seq, *more]
        for batch, seq, mine in ROOM_22
        for who, more in (([], mine), (["unsloth"], ["--recompute", "1"]))
    ],
    "longest": [
        ["--bits", "4", "--batch", "1", "--seq", "98304", "--recompute", "-1", "--offload",
         "--budget", "0.7", "--steps", "2"],
        ["unsloth", "--bits", "4", "--batch", "1", "--seq", "98304", "--steps", "2"],
    ],
    "small": [
        ["--bits", bits, "--batch", "1", "--seq", "512", *graph]
        for bits in ("16", "8", "4")
        for graph in ([], ["--graph"])
    ],
    "lengths": [
        ["--bits", "4", "--batch", batch, "--seq", seq, "--budget", budget]
        for batch, seq, budget in (
            ("8", "1024", "0.7"), ("2", "4096", "0.7"), ("1", "8192", "0.7"), ("1", "16384", "0.9"),
        )
    ],
    "bloom": [
        ["--model", "bloom2b6", "--bits", bits, "--batch", "8", "--seq", "1024"]
        for bits in ("4", "8", "16")
    ],
}  # fmt: skip


def command(case: list[str], folder: str | None) -> list[str]:
    """Returns the command line of a case."""
    if case[0].startswith("--"):
        return [sys.executable, str(HERE / "gpu_step.py"), *case]
    if folder is None:
        raise SystemExit("peers load weights: give --folder, written by gpu_step.py --save")
    return [sys.executable, str(HERE / "gpu_peer.py"), "--impl", *case, "--folder", folder]


def run(case: list[str], folder: str | None, timeout: float) -> dict[str, Any]:
    """Runs one case; returns its row."""
    try:
        done = subprocess.run(
            command(case, folder), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"way": " ".join(case), "note": f"not done after {timeout:.0f} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"way": " ".join(case), "note": said[-1][:200] if said else "no output"}
    row: dict[str, Any] = json.loads(found[-1][7:])
    row["peak_gib"] = round(row["peak_bytes"] / 2**30, 2) if row.get("peak_bytes") else None
    floor = FLOORS.get((row["model"], row["batch"], row["seq"]))
    if floor:
        row["floor_ms"], row["to_floor"] = floor, round(row["ms"] / floor, 3)
    return row


def tables(files: list[Path]) -> str:
    """Returns the rows of CSV files as Markdown, a table for each model and shape."""
    rows: list[dict[str, str]] = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            rows += csv.DictReader(lines)
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        shape = tuple(row[name] for name in ("model", "batch", "seq"))
        groups.setdefault(shape if row["ms"] else ("no result", "", ""), []).append(row)
    text = []
    for (model, batch, seq), found in groups.items():
        text.append(f"\n**{model}, {batch} x {seq}**\n" if batch else f"\n**{model}**\n")
        text.append("| | bits | ms (best) | tokens/s | GiB | to floor | losses of steps 1-3 |")
        text.append("|---|---|---|---|---|---|---|")
        for row in sorted(found, key=lambda row: (-int(row["bits"] or 0), float(row["ms"] or 0))):
            text.append(_line(row))
    return "\n".join(text)


def _line(row: dict[str, str]) -> str:
    name = {"fast": "Glasstune", "compiled": "PEFT, blocks compiled", "hf": "transformers + PEFT"}
    words = [name.get(row["way"], row["way"].capitalize())]
    if row["budget"] not in ("", "None"):
        words.append(f"budget {float(row['budget']):g}")
    if row["recompute"] not in ("", "0", "False"):
        again = "all layers" if row["recompute"] in ("-1", "True") else f"{row['recompute']} layers"
        words.append(f"{again} recomputed")
    if row["offload"] == "True":
        words.append("their inputs on the host")
    if row["graph"] == "True":
        words.append("replayed as CUDA graphs")
    if not row["ms"]:
        return f"| {row['way']} | | {row['note']} | | | | |"
    speed = f"{float(row['ms']):.0f} ({float(row['ms_min']):.0f})"
    rate = f"{int(float(row['tokens_per_second'])):,}"
    losses = row["losses"].strip("[]").replace(",", "")
    cells = [", ".join(words), row["bits"], speed, rate, row["peak_gib"], row["to_floor"], losses]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="CSV")
    parser.add_argument("--folder", help="weights for the peers")
    parser.add_argument("--timeout", type=float, default=180, help="seconds of a case")
    args = parser.parse_args(argv)
    if args.markdown:
        print(tables(args.markdown))
        return 0
    if args.csv is None or not args.suites or not set(args.suites) <= set(SUITES):
        parser.error(f"give --csv FILE and suites out of {', '.join(SUITES)}")
    start = time.monotonic()
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for case in (case for name in args.suites for case in SUITES[name]):
            row = run(case, args.folder, args.timeout)
            writer.writerow(row)
            file.flush()
            shown = {key: row.get(key) for key in ("ms", "peak_gib", "to_floor", "losses", "note")}
            seconds = time.monotonic() - start
            print(f"[{seconds:4.0f} s] {' '.join(case)}: {shown}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
