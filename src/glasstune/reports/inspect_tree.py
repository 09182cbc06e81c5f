"""The inspect record on a terminal: the tree with its precisions side by side, totals, findings.

A wide terminal shows a column a precision; where that does not fit, the precisions of a module
stand in one line below it. Why a module stays at 16 bit is a letter that is told below the tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from glasstune.core.units import format_seconds
from glasstune.reports.folding import Child, Node, fold_tree, quantised, stays
from glasstune.reports.inspect_parts import PARTS, all_findings, lora_places
from glasstune.reports.inspect_text import lora_text, prefix, short_detail, tree_lines
from glasstune.reports.numbers import UNITS, count_text, percent_text, shape_text, size_text
from glasstune.reports.tables import print_findings, say

__all__ = ["print_inspect", "tree_lines"]

Json = Mapping[str, Any]

SHOWN_ERRORS = 20

GAP = "  "
"""Between columns; the first of them stands one space behind the tree."""


def print_inspect(record: Any, console: Console, depth: int | None = None) -> None:
    """Prints an inspect record.

    Args:
        record: An `InspectRecord`, or its JSON object.
        console: Where to; its width decides the layout.
        depth: Modules at this depth (the model has 0) show `(...)` instead of what they hold.
    """
    json: Json = record if isinstance(record, Mapping) else record.to_dict()
    precisions: Mapping[str, Json] = json["precisions"]
    tree = fold_tree({key: value["modules"] for key, value in precisions.items()})
    say(
        console,
        f"{json['model']}: {json['architecture']}, {count_text(tree.parameters)} parameters",
    )
    say(console, "")
    _print_tree(tree, precisions, console, depth)
    say(console, "")
    _print_totals(json, console)
    say(console, "")
    for place in lora_places(tree):
        say(
            console,
            f"{place.name}: {place.text} on {place.count:,}: {place.parameters:,} parameters, "
            f"{size_text(place.training_bytes)} with gradients and optimiser state",
        )
    say(console, str(json["peft_line"]))
    if json.get("error"):
        say(console, "")
        _print_errors(json["error"], console)
    findings = all_findings(json)
    if findings:
        say(console, "")
        print_findings([_labelled(finding) for finding in findings], console)


def _labelled(finding: Json) -> dict[str, Any]:
    """Puts the precisions of a finding behind its place."""
    labels = " and ".join(finding["labels"])  # a label may hold a comma
    place = f"{finding['where']} ({labels})" if labels and finding["where"] else finding["where"]
    return {**finding, "where": place or labels}


@dataclass(slots=True)
class _Line:
    """One module: its place in the tree, and by precision class, size and letter."""

    full: str
    short: str
    indent: int
    cells: dict[str, tuple[str, str, str]]


@dataclass(slots=True)
class _Lines:
    """Collects the lines of a tree and the reasons that its letters stand for."""

    precisions: Mapping[str, Json]
    depth: int | None
    lines: list[_Line] = field(default_factory=list)
    letters: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, child: Child, level: int = 0) -> None:
        """Adds a module and what is below it."""
        node = child.node
        row = node.row
        cut = bool(node.children) and self.depth is not None and level >= self.depth
        lora = f" + {lora_text(node.lora)}" if node.lora else ""
        tied = f" = {row['tied_to']}" if row["tied_to"] else ""
        head = f"{'  ' * level}{prefix(child)}{row['original_class']}"
        detail = row["detail"].replace("\n", ", ")
        inside = "(...)" if cut else ""
        leaf = not node.children
        self.lines.append(
            _Line(
                full=f"{head}{f'({detail})' if leaf else inside}{tied}{lora}",
                short=f"{head}{f'({short_detail(detail)})' if leaf else inside}{tied}{lora}",
                indent=2 * level,
                cells={key: self._cell(child, key) for key in self.precisions},
            )
        )
        if not cut:
            for below in node.children:
                self.add(below, level + 1)

    def _cell(self, child: Child, key: str) -> tuple[str, str, str]:
        node = child.node
        size = node.bytes.get(key, 0)
        row = node.rows.get(key)
        shown = size_text(size) if size else ""
        if size and child.count > 1:
            shown = f"{child.count} x {shown}"
        if row is None:
            return "", shown, ""
        name = row["class"] if row["class"] != row["original_class"] else ""
        if not name and quantised(row):
            name = str(row["dtype"])
        return name, shown, self._letter(row, key)

    def _letter(self, row: Json, key: str) -> str:
        if self.precisions[key]["bits"] == 16 or not stays(row) or not row["reason"]:
            return ""
        # One code may have several sentences; each gets a letter of its own.
        names = (row["reason_code"], row["reason"])
        if names not in self.letters:
            index = len(self.letters)
            self.letters[names] = chr(97 + index % 26) * (1 + index // 26)
        return self.letters[names]


def _print_tree(
    tree: Node, precisions: Mapping[str, Json], console: Console, depth: int | None
) -> None:
    lines = _Lines(precisions, depth)
    lines.add(Child("", "", 1, tree))
    widths = {key: _widths(lines.lines, key, value["label"]) for key, value in precisions.items()}
    columns = sum(_room(parts) + len(GAP) for parts in widths.values()) - 1
    for text in ("full", "short"):
        name_width = max(len(getattr(line, text)) for line in lines.lines)
        if name_width + columns <= console.width:
            _print_wide(lines.lines, precisions, widths, console, text, name_width)
            break
    else:
        _print_stacked(lines.lines, precisions, console)
    if lines.letters:
        say(console, "")
        say(console, "stays at 16 bit:")
        for (code, reason), letter in lines.letters.items():
            _hanging(console, f"  {letter}  ", f"{reason} [{code}]")


def _widths(lines: list[_Line], key: str, label: str) -> tuple[int, int, int]:
    """Returns the widths of class, size and letter at one precision."""
    cells = [line.cells[key] for line in lines]
    mark = max(len(cell[2]) for cell in cells)
    # A size without a class may reach into the class's place, as a run's `30 x 40.6 MB` does.
    name = max((len(cell[0]) for cell in cells if cell[0]), default=0)
    size = max((len(cell[1]) for cell in cells if cell[0]), default=0)
    alone = max((len(cell[1]) for cell in cells if not cell[0]), default=0)
    gap = 1 if name else 0
    word = max(len(part) for part in label.split() or [""])
    size = max(size, alone - name - gap, word - name - gap)
    return name, size, mark


def _room(widths: tuple[int, int, int]) -> int:
    """Returns the width of a column: class, size and letter with the spaces between them."""
    name, size, mark = widths
    return name + size + mark + (1 if name else 0) + (1 if mark else 0)


def _print_wide(
    lines: list[_Line],
    precisions: Mapping[str, Json],
    widths: Mapping[str, tuple[int, int, int]],
    console: Console,
    text: str,
    name_width: int,
) -> None:
    for head in _heads(precisions, widths, name_width):
        _line(console, head, "bold")
    for line in lines:
        shown = ""
        for key in precisions:
            name, size, mark = widths[key]
            own, bytes_, letter = line.cells[key]
            room = name + size + (1 if name else 0)
            cell = f"{own.ljust(name)} {bytes_.rjust(size)}" if own else bytes_.rjust(room)
            shown += f"{GAP}{cell}" + (f" {letter.ljust(mark)}" if mark else "")
        say(console, (getattr(line, text).ljust(name_width) + shown[1:]).rstrip())


def _heads(
    precisions: Mapping[str, Json], widths: Mapping[str, tuple[int, int, int]], name_width: int
) -> list[str]:
    """Returns the lines of the columns' labels, over the sizes; long labels break at spaces."""
    columns: list[list[str]] = []
    for key, value in precisions.items():
        room, mark = _room(widths[key]), widths[key][2]
        lines = wrap(str(value["label"]), room - (mark + 1 if mark else 0)) or [""]
        columns.append(
            [GAP + f"{line:>{room - (mark + 1 if mark else 0)}}".ljust(room) for line in lines]
        )
    height = max(len(lines) for lines in columns)
    blank = [" " * len(lines[0]) for lines in columns]
    heads = []
    for index in range(height):
        cells = [
            lines[index - height + len(lines)] if index >= height - len(lines) else empty
            for lines, empty in zip(columns, blank, strict=True)
        ]
        heads.append((" " * name_width + "".join(cells)[1:]).rstrip())
    return heads


def _print_stacked(lines: list[_Line], precisions: Mapping[str, Json], console: Console) -> None:
    fits = all(len(line.full) <= console.width for line in lines)
    for line in lines:
        name = line.full if fits else line.short
        _hanging(console, name[: line.indent], name[line.indent :])
        parts = []
        for key in precisions:
            own, size, letter = line.cells[key]
            if size:
                words = " ".join(word for word in (own, size, letter) if word)
                parts.append(f"{key}: {words}")
        if parts:
            _hanging(console, " " * (line.indent + 4), " · ".join(parts), "dim")


def _hanging(console: Console, indent: str, text: str, style: str = "") -> None:
    """Prints text after an indent; further lines start two places right of it."""
    room = max(20, console.width - len(indent))
    lines = Text(text).wrap(console, room, overflow="fold")
    for index, line in enumerate(lines):
        start = indent if index == 0 else " " * (len(indent) + 2)
        _line(console, start + line.plain.rstrip(), style)
        if index == 0 and len(lines) > 1:
            rest = " ".join(part.plain.strip() for part in lines[1:])
            for more in Text(rest).wrap(console, room - 2, overflow="fold"):
                _line(console, " " * (len(indent) + 2) + more.plain.rstrip(), style)
            return


def _line(console: Console, text: str, style: str) -> None:
    console.print(Text(text, style=style), soft_wrap=True, highlight=False)


def _print_totals(record: Json, console: Console) -> None:
    precisions: Mapping[str, Json] = record["precisions"]
    rows = list(_total_rows(record))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("bytes", no_wrap=True)
    for value in precisions.values():
        table.add_column(str(value["label"]), justify="right", overflow="fold")
    for label, cells in rows:
        table.add_row(label, *cells)
    names = max(len(label) for label, _ in rows)
    columns = [max(len(cells[index]) for _, cells in rows) for index in range(len(precisions))]
    # A label may break at its spaces, a number may not.
    words = [max(map(len, str(value["label"]).split())) for value in precisions.values()]
    room = sum(max(pair) + 2 for pair in zip(columns, words, strict=True))
    if names + 2 + room <= console.width:
        console.print(table)
    else:
        _print_totals_stacked(rows, precisions, console, names)
    say(console, UNITS)


def _print_totals_stacked(
    rows: list[tuple[str, list[str]]],
    precisions: Mapping[str, Json],
    console: Console,
    names: int,
) -> None:
    for index, value in enumerate(precisions.values()):
        _line(console, str(value["label"]), "bold")
        width = max(len(cells[index]) for _, cells in rows)
        for label, cells in rows:
            if cells[index] != "-":
                say(console, f"  {label.ljust(names)}  {cells[index].rjust(width)}")


def _total_rows(record: Json) -> Iterator[tuple[str, list[str]]]:
    values = list(record["precisions"].values())
    for name, _, short, _ in PARTS:
        if any(name in value["bytes_by_part"] for value in values):
            sizes = [value["bytes_by_part"].get(name) for value in values]
            yield (
                f"{short} weights" if name.endswith("bit") else short,
                ["-" if size is None else f"{size:,}" for size in sizes],
            )
    yield "total", [f"{value['total_bytes']:,}" for value in values]
    yield "", [size_text(value["total_bytes"]) for value in values]
    yield "left at 16 bit", [percent_text(value["kept_share"]) for value in values]
    if any(value["largest_transient_bytes"] for value in values):
        yield (
            "largest expansion",
            [
                size_text(value["largest_transient_bytes"])
                if value["largest_transient_bytes"]
                else "-"
                for value in values
            ],
        )
    if record.get("adapter"):
        yield "adapter in training", [size_text(value["adapter_bytes"]) for value in values]


def _print_errors(error: Json, console: Console) -> None:
    names = {"8": "8 bit", "nf4": "NF4", "fp4": "FP4", "nf4_double": "NF4 double"}
    kinds = list(error["mean"])
    layers = error["layers"]
    say(
        console,
        f"quantisation error (norm of the change over the norm of the weight), worst first; "
        f"read from {error['source']} in {format_seconds(error['seconds'])}",
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    for kind in kinds:
        table.add_column(names.get(kind, kind), justify="right", no_wrap=True)
    for layer in layers[:SHOWN_ERRORS]:
        cells = [_error(layer["errors"].get(kind)) for kind in kinds]
        table.add_row(layer["path"], shape_text(layer["shape"]), *cells)
    table.add_row("all layers together", "", *(_error(error["mean"][kind]) for kind in kinds))
    console.print(table)
    if len(layers) > SHOWN_ERRORS:
        say(
            console,
            f"{len(layers) - SHOWN_ERRORS} better layers are not shown; --json has them all",
        )


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"
