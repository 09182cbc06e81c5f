"""The tree of an inspect record with all precisions in one, equal neighbours folded.

One rule for the terminal and the page: neighbours with consecutive numbers as names fold when
everything below them is equal at every precision: classes, shapes, bytes, reasons, LoRA.
Equal subtrees are one object, so a model of 80 equal blocks is as small as one of a single block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Child:
    """A module under its parent, or a run of equal ones.

    Args:
        name: Its name; of a run, that of the first.
        last: Name of the last of the run; the same as `name` outside a run.
        count: How many fold into it.
        node: What it is.
    """

    name: str
    last: str
    count: int
    node: Node

    @property
    def label(self) -> str:
        """The name in brackets of `print(model)`: `dense`, `0-29`."""
        return self.name if self.count == 1 else f"{self.name}-{self.last}"


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A module with everything below it, without its own name and place.

    Args:
        rows: By precision, the row of the record; a module that a precision lacks is left out.
        children: In the order of the model, folded.
        bytes: By precision, of it and all below.
        parameters: Logical, of it and all below, at the first precision that has it.
    """

    rows: Mapping[str, Json]
    children: tuple[Child, ...]
    bytes: Mapping[str, int]
    parameters: int

    @property
    def row(self) -> Json:
        """The row at the first precision that has it."""
        return next(iter(self.rows.values()))

    @property
    def lora(self) -> Json | None:
        """What an adapter adds here, the same at every precision that shows one."""
        return next((row["lora"] for row in self.rows.values() if row.get("lora")), None)


def fold_tree(precisions: Mapping[str, Iterable[Json]]) -> Node:
    """Builds the folded tree.

    Args:
        precisions: By precision, its module rows as JSON (`ModuleRow.to_dict()`), in the order
            of `named_modules`; the first has the path "".

    Returns:
        The model itself.
    """
    rows: dict[str, dict[str, Json]] = {"": {}}
    for precision, modules in precisions.items():
        for row in modules:
            rows.setdefault(row["path"], {})[precision] = row
    below: dict[str, list[str]] = {}
    for path in rows:
        if path:
            below.setdefault(_parent(path, rows), []).append(path)
    folder = _Folder(tuple(precisions), rows, below)
    return folder.node("")


def stays(row: Json) -> bool:
    """Whether a module holds parameters (tied ones too) that are left as they are."""
    return (row["parameters"] > 0 or row["tied_to"] is not None) and not quantised(row)


def quantised(row: Json) -> bool:
    """Whether the weight of a module is quantised."""
    return row["dtype"] in ("int8", "nf4", "fp4") or row["class"] != row["original_class"]


def _parent(path: str, rows: Mapping[str, Any]) -> str:
    """Returns the nearest ancestor that the record has."""
    while path:
        path = path.rpartition(".")[0]
        if path in rows:
            break
    return path


class _Folder:
    """Makes nodes and keeps one of each kind."""

    def __init__(
        self,
        precisions: tuple[str, ...],
        rows: Mapping[str, Mapping[str, Json]],
        below: Mapping[str, list[str]],
    ) -> None:
        self.precisions = precisions
        self.rows = rows
        self.below = below
        self.known: dict[Any, Node] = {}

    def node(self, path: str) -> Node:
        """Returns the node of a path; equal subtrees give the same object."""
        prefix = len(path) + 1 if path else 0
        children = _folded(
            [(child[prefix:], self.node(child)) for child in self.below.get(path, ())]
        )
        rows = self.rows[path]
        key = (
            tuple((name, _key(row)) for name, row in rows.items()),
            tuple((child.name, child.last, id(child.node)) for child in children),
        )
        if key not in self.known:
            self.known[key] = self._made(rows, children)
        return self.known[key]

    def _made(self, rows: Mapping[str, Json], children: tuple[Child, ...]) -> Node:
        sizes = {
            name: (rows[name]["bytes"] if name in rows else 0)
            + sum(child.count * child.node.bytes.get(name, 0) for child in children)
            for name in self.precisions
        }
        own = next(iter(rows.values()))["parameters"] if rows else 0
        parameters = own + sum(child.count * child.node.parameters for child in children)
        return Node(rows, children, sizes, parameters)


def _folded(children: list[tuple[str, Node]]) -> tuple[Child, ...]:
    """Folds neighbours with consecutive numbers that are the same node."""
    runs: list[Child] = []
    for name, node in children:
        before = runs[-1] if runs else None
        if (
            before is not None
            and before.node is node
            # Only numbered children fold: q_proj and o_proj may be equal and are two names.
            and name.isdecimal()
            and before.last.isdecimal()
            and int(name) == int(before.last) + 1
        ):
            runs[-1] = Child(before.name, name, before.count + 1, node)
        else:
            runs.append(Child(name, name, 1, node))
    return tuple(runs)


def _key(row: Json) -> tuple[Any, ...]:
    """Returns all of a row but its place, so that equal modules have equal keys."""
    path = row["path"]
    # A reason may name its module: that alone makes no difference. A path without a dot may be a
    # mere number, which a sentence holds for other causes.
    reason = row["reason"].replace(path, "") if "." in path else row["reason"]
    return (reason, *(_frozen(row[name]) for name in row if name not in ("path", "reason")))


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _frozen(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    return value
