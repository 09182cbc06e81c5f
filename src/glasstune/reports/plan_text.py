"""The plan on a terminal: a bar of parts against what may be used, then the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from glasstune.core.plan import PARTS
from glasstune.core.units import format_bytes, format_seconds
from glasstune.reports.numbers import counted
from glasstune.reports.tables import print_choices, print_findings, say

Json = Mapping[str, Any]

LETTERS = {
    "base": "B",
    "adapters": "A",
    "gradients": "G",
    "optimizer": "O",
    "activations": "a",
    "workspace": "w",
    "context": "c",
}
"""What stands for a part in the bar: letters tell parts apart without colour."""

ABOUT = {
    "base": "frozen weights as they are stored",
    "adapters": "trained tensors, float32",
    "gradients": "of the adapters",
    "optimizer": "AdamW's moments",
    "activations": "kept for the backward",
    "workspace": "buffers of a moment: logits, expanded weights, gradients of activations",
    "context": "driver and libraries; on a CPU Python and the data",
}

PHASES = {
    "load": "loading",
    "forward": "forward",
    "loss": "loss",
    "audit": "audit by term",
    "backward": "backward",
    "optimizer": "optimiser's step",
    "evaluation": "evaluation",
}


def print_plan(record: Any, console: Console) -> None:
    """Prints a plan record.

    Args:
        record: A `PlanRecord`, or its JSON object.
        console: Where to; the bar takes its width.
    """
    json: Json = record if isinstance(record, Mapping) else record.to_dict()
    say(
        console,
        f"{json['model']} at {json['bits']} bit on {json['device']}: peak "
        f"{format_bytes(json['peak_bytes'])} of {format_bytes(json['limit_bytes'])} "
        f"({json['limit_reason']})",
    )
    say(console, "")
    for line in bar_lines(json, max(40, min(console.width, 100)) - 2):
        say(console, line)
    say(console, "")
    _print_parts(json, console)
    say(console, "")
    say(
        console,
        f"The peak is in the {PHASES.get(json['phase'], json['phase'])} "
        f"({_where(json)}); the largest part is then {json['owner']}.",
    )
    say(console, f"Recomputation: {json['reason']}.")
    _print_time(json, console)
    _print_alternatives(json, console)
    _print_several(json, console)
    say(console, "")
    for name, text in json["basis_of"].items():
        say(console, f"{name}: {text}")
    if json.get("choices"):
        say(console, "")
        say(console, "Chosen by itself:")
        print_choices(json["choices"], console)
    if json["findings"]:
        say(console, "")
        print_findings(json["findings"], console)


def bar_lines(json: Json, width: int) -> list[str]:
    """Draws the parts of the peak as one bar against the limit.

    Args:
        json: The record.
        width: Characters that the bar may take.

    Returns:
        The bar, and a line that marks the measured peak where there is one.
    """
    whole = max(int(json["limit_bytes"]), int(json["peak_bytes"]), 1)
    cells = _cells([int(json["parts"].get(name, 0)) for name in PARTS], whole, width)
    filled = "".join(LETTERS[name] * count for name, count in zip(PARTS, cells, strict=True))
    free = width - len(filled)
    lines = [f"[{filled}{'.' * max(0, free)}]"]
    edge = round(int(json["limit_bytes"]) / whole * width)
    if edge < width:
        lines.append(" " * (edge + 1) + "^ what may be used ends here")
    if json.get("measured_peak_bytes"):
        place = min(width - 1, round(int(json["measured_peak_bytes"]) / whole * width))
        lines.append(" " * (place + 1) + "^ measured")
    return lines


def _cells(sizes: Sequence[int], whole: int, width: int) -> list[int]:
    """Shares a bar's characters: by cumulative rounding, so that the sum is right."""
    cells, done, start = [], 0, 0
    for size in sizes:
        done += size
        end = round(done / whole * width)
        cells.append(max(0, end - start))
        start = max(start, end)
    return cells


def _print_parts(json: Json, console: Console) -> None:
    table = Table(box=None, padding=(0, 2), show_header=True)
    table.add_column("")
    table.add_column("part")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("of the peak", justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for name in PARTS:
        size = json["parts"].get(name, 0)
        share = size / max(1, json["peak_bytes"])
        table.add_row(LETTERS[name], name, format_bytes(size), f"{share:.0%}", ABOUT[name])
    table.add_row("", "peak", format_bytes(json["peak_bytes"]), "", "")
    if json.get("measured_peak_bytes"):
        table.add_row(
            "", "measured", format_bytes(json["measured_peak_bytes"]), f"{json['error']:+.1%}",
            "a real step of the longest batch; the plan's error",
        )  # fmt: skip
    console.print(table)
    phases = ", ".join(
        f"{PHASES.get(moment['phase'], moment['phase'])} {format_bytes(moment['bytes'])}"
        for moment in json["moments"]
    )
    say(console, f"By phase: {phases}")
    if json.get("layer_bytes"):
        say(console, f"Kept by each layer: {layers_text(json['layer_bytes'])}")


def layers_text(sizes: Sequence[int]) -> str:
    """Writes what layers keep, equal neighbours together: `0 to 3: 1.0 MiB, 4: 9.0 MiB`."""
    runs: list[tuple[int, int, str]] = []
    for index, size in enumerate(map(format_bytes, sizes)):
        if runs and runs[-1][2] == size:
            runs[-1] = (runs[-1][0], index, size)
        else:
            runs.append((index, index, size))
    return ", ".join(
        f"{first}: {size}" if first == last else f"{first} to {last}: {size}"
        for first, last, size in runs
    )


def _where(json: Json) -> str:
    return next(
        (moment["where"] for moment in json["moments"] if moment["phase"] == json["phase"]), ""
    )


def _print_time(json: Json, console: Console) -> None:
    say(
        console,
        f"Time: {counted(json['updates'], 'update')} of "
        f"{format_seconds(json['seconds_per_update'])}, "
        f"{format_seconds(json['total_seconds'])} in all "
        f"({format_seconds(json['evaluation_seconds'])} of it evaluations), about "
        f"{json['tokens_per_second']:,.0f} tokens/s: {json['basis']}",
    )
    fetched = json["download_bytes"]
    download = "not known" if fetched is None else format_bytes(fetched)
    say(console, f"Disk: {format_bytes(json['disk_bytes'])} written; download: {download}")
    say(
        console,
        f"Largest batch: {counted(json['rows'], 'row')} of {counted(json['length'], 'token')}, "
        f"{json['trained_tokens']:,} trained",
    )


def _print_alternatives(json: Json, console: Console) -> None:
    if not json["alternatives"]:
        return
    say(console, "")
    table = Table(title="Other ways", title_justify="left", box=None, padding=(0, 2))
    table.add_column("change", overflow="fold")
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("in all", justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for item in json["alternatives"]:
        change = ", ".join(f"{key}={value}" for key, value in item["change"].items())
        table.add_row(
            change, format_bytes(item["peak_bytes"]), format_seconds(item["total_seconds"]),
            "yes" if item["fits"] else "no",
        )  # fmt: skip
    console.print(table)


def _print_several(json: Json, console: Console) -> None:
    if not json["several"]:
        return
    say(console, "")
    table = Table(
        title="Each of several devices (by formula)", title_justify="left", box=None,
        padding=(0, 2),
    )  # fmt: skip
    table.add_column("devices", justify="right")
    table.add_column("strategy")
    table.add_column("peak of one", justify="right", no_wrap=True)
    for item in json["several"]:
        table.add_row(str(item["devices"]), item["strategy"], format_bytes(item["peak_bytes"]))
    console.print(table)
