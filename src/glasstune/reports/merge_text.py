"""A merge certificate on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from glasstune.core.units import format_seconds
from glasstune.reports.numbers import size_text

Json = Mapping[str, Any]


def print_merge(record: Json, console: Console) -> None:
    """Prints what was written, how close it is, and who reads the adapter without a merge.

    Args:
        record: A certificate as a dict.
        console: Where it goes.
    """
    for line in merge_lines(record):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def merge_lines(record: Json) -> list[str]:
    """Returns the text, line by line."""
    weights, prompts = record["weights"], record["prompts"]
    base = "its base's original weights"
    if record["onto"] == "training":
        base = f"its base as training had it ({record['base']['precision']})"
    seconds = record["seconds"]
    lines = [
        f"merged {record['adapter']['path']}",
        f"  into {base}: {record['base']['path']}",
        f"  as {record['output']}: {weights['changed']:,} tensors changed, {weights['copied']:,} "
        f"copied, {size_text(weights['bytes'])} in {record['dtype']}",
    ]
    if record["tied"] == "untied":
        lines.append("  head and embedding are two weights now (written in config.json)")
    lines.append("")
    if record["passed"] is None:
        lines.append("certificate: not measured (--no-certificate)")
    else:
        lines += _numbers(record, prompts)
    lines += ["", "this adapter as it is:"]
    for name, reader in record["readers"].items():
        reasons = "; ".join(reader["reasons"])
        says = "accepts it" if reader["accepts"] else "does not"
        lines.append(f"  {name:<10} {says}{f': {reasons}' if reasons else ''}")
    parts = " + ".join(f"{name} {format_seconds(value)}" for name, value in seconds.items())
    lines += ["", f"{parts}, peak memory {size_text(record['peak_memory_bytes'])}"]
    return lines


def _numbers(record: Json, prompts: Json) -> list[str]:
    passed = "passed" if record["passed"] else "FAILED"
    lines = [
        f"certificate: {passed}, {record['gate']} {_nats(record['merge_kl_mean'])} "
        f"<= {record['max_kl']:g}"
        if record["passed"]
        else f"certificate: {passed}, {record['gate']} {_nats(record['merge_kl_mean'])} "
        f"> {record['max_kl']:g}",
        f"  over {prompts['tokens']:,} tokens of {prompts['held_out']} held-out rows and "
        f"{prompts['generic']} generic prompts; merged model read back from the disk, float32",
        f"  worst token {_nats(record['merge_kl_max'])}, largest logit difference "
        f"{_nats(record['merge_max_logit_difference'])}",
        f"  same most likely token: {record['token_agreement']:.2%}; same "
        f"{prompts['greedy_tokens']} next tokens: {record['greedy_agreement']:.0%} of prompts",
    ]
    if record["rounding_kl_mean"] is not None:
        lines.append(
            f"  running it in {record['dtype']} moves it by {_nats(record['rounding_kl_mean'])} "
            "anyway"
        )
    if record["base_kl_mean"] is not None:
        lines.append(
            f"  the precision of training's base ({record['base']['precision']}) costs "
            f"{_nats(record['base_kl_mean'])} against the original: reported, no gate"
        )
    return lines


def _nats(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3g}"
