"""Records as tables and sentences. A severity is a word; no meaning hangs on a colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from glasstune.core.units import format_bytes, format_seconds

Json = Mapping[str, Any]


def print_record(kind: str, record: Json, console: Console) -> None:
    """Prints the record of a command (`train`, `dry_run`, `data`, `evaluate`, `doctor`, ...)."""
    printers = {
        "train": _train,
        "dry_run": _dry_run,
        "data": print_data,
        "evaluate": _evaluate,
        "doctor": _doctor,
    }
    printers.get(kind, _generic)(record, console)


def print_findings(findings: Iterable[Any], console: Console) -> None:
    """Prints findings: severity, code, place, what was seen, and a hint line."""
    for item in findings:
        finding: Json = item if isinstance(item, Mapping) else item.to_dict()
        place = f" {finding['where']}:" if finding.get("where") else ""
        say(console, f"{finding['severity']} [{finding['code']}]{place} {finding['message']}")
        if finding.get("fix"):
            say(console, f"  hint: {finding['fix']}")


def print_choices(choices: Iterable[Any], console: Console) -> None:
    """Prints automatic choices, each with its reason."""
    for item in choices:
        choice: Json = item if isinstance(item, Mapping) else item.to_dict()
        say(console, f"{choice['name']}: {choice['value']} ({choice['reason']})")


def say(console: Console, text: str) -> None:
    """Prints a line as it is: no markup, no breaking of long lines."""
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _pairs(console: Console, rows: Sequence[tuple[str, str]], title: str | None = None) -> None:
    if title is not None:
        say(console, title)
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _loss(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _train(record: Json, console: Console) -> None:
    print_findings(record["findings"], console)
    before, after = record["eval_loss_before"], record["eval_loss_after"]
    rows = [
        ("stopped by", str(record["stopped_by"])),
        ("updates", f"{record['updates']:,}"),
        ("held-out loss before", _loss(before)),
        ("held-out loss after", _loss(after)),
        ("best step", "-" if record["best_step"] is None else str(record["best_step"])),
        ("trained tokens", f"{record['trained_tokens']:,}"),
        ("time", format_seconds(record["seconds"])),
        ("peak memory", format_bytes(record["peak_memory_bytes"])),
        ("adapter", str(record["adapter"])),
    ]
    _pairs(console, rows)


def _dry_run(record: Json, console: Console) -> None:
    print_choices(record.get("choices", ()), console)
    print_data(record["data"], console)
    say(console, f"updates: {record['updates']:,}")
    if record.get("config"):
        say(console, "")
        say(console, str(record["config"]).rstrip())


def print_data(record: Json, console: Console) -> None:
    """Prints a data record: counts, lengths, sources, findings."""
    print_findings(record["findings"], console)
    lengths = record["lengths"]
    dropped = ", ".join(f"{why} {count:,}" for why, count in record["dropped"].items() if count)
    share = record["trained_tokens"] / record["tokens"] if record["tokens"] else 0.0
    rows = [
        ("rows", f"{record['rows']:,}"),
        ("kept", f"{record['kept']:,}"),
        ("dropped", dropped or "0"),
        ("tokens", f"{record['tokens']:,}"),
        ("trained tokens", f"{record['trained_tokens']:,} ({share:.0%})"),
        ("lengths", " · ".join(f"{name} {value:,}" for name, value in lengths.items())),
    ]
    if record.get("held_out"):
        rows.insert(2, ("of them held out", f"{record['held_out']:,}"))
    for key in ("cut", "duplicates"):
        if record.get(key):
            rows.append((key, f"{record[key]:,}"))
    if scripts := record.get("scripts"):
        rows.append(("scripts", " · ".join(f"{name} {part:.1%}" for name, part in scripts.items())))
    if policies := record.get("policies"):
        rows.append(("policies", " · ".join(f"{key}: {value}" for key, value in policies.items())))
    _pairs(console, rows)
    sources = record["by_source"]
    if sources:
        names = list(dict.fromkeys(name for values in sources.values() for name in values))
        _table(console, "source", names, sources)


def _table(console: Console, first: str, names: Sequence[str], rows: Json) -> None:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column(first, overflow="fold")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for label, values in rows.items():
        table.add_row(str(label), *(_cell(values.get(name)) for name in names))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _evaluate(record: Json, console: Console) -> None:
    rows = [
        ("loss", _loss(record["eval_loss"])),
        ("perplexity", f"{record['perplexity']:.3f}"),
        ("token accuracy", f"{record['token_accuracy']:.2%}"),
        ("tokens", f"{record['tokens']:,}"),
    ]
    metrics = record["metrics"]
    if not metrics:
        _pairs(console, rows)
    else:
        _pairs(console, rows[-1:])
        names = list(dict.fromkeys(name for values in metrics.values() for name in values))
        _table(console, "model", names, metrics)
    if len(record["by_source"]) > 1:
        values = record["by_source"].values()
        names = list(dict.fromkeys(name for item in values for name in item))
        _table(console, "source", names, record["by_source"])


def _doctor(record: Json, console: Console) -> None:
    device = record["device"]
    rows = [
        ("device", f"{device['name']} ({device['kind']})"),
        ("free memory", format_bytes(device["free_bytes"])),
        ("total memory", format_bytes(device["total_bytes"])),
        ("free disk", f"{format_bytes(record['disk']['free_bytes'])} at {record['disk']['path']}"),
        ("python", str(record["python"])),
    ]
    _pairs(console, rows)
    _pairs(console, [(name, str(value)) for name, value in record["versions"].items()], "versions")
    checks = {name: f"{c['status']}: {c['detail']}" for name, c in record["checks"].items()}
    _pairs(console, list(checks.items()), "what works here")
    fits = [(f"{bits} bit", f"about {size / 1e9:.1f} billion") for bits, size in _fits(record)]
    _pairs(console, fits, "parameters of a base model that fit (rough)")
    print_findings(record["findings"], console)


def _fits(record: Json) -> list[tuple[str, float]]:
    return list(record["fits_parameters"].items())


def _generic(record: Json, console: Console) -> None:
    _pairs(console, [(name.replace("_", " "), _show(value)) for name, value in record.items()])


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_show(item)}" for name, item in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(_show(item) for item in value) or "-"
    return _cell(value)
