"""What the terminal and the page of an inspect record share: parts, findings, the overlay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glasstune.reports.findings import worst_first
from glasstune.reports.folding import Node
from glasstune.reports.inspect_text import lora_text

Json = Mapping[str, Any]

PARTS = (
    ("16bit", "part-16", "16 bit", "weights and biases not quantised"),
    ("8bit", "part-8", "8 bit", "quantised weights"),
    ("4bit", "part-4", "4 bit", "packed weights"),
    ("scales", "part-scales", "scales", "one for each row or block of a quantised weight"),
    ("code", "part-scales", "code", "tables of the values that a code stands for"),
    ("buffers", "part-other", "buffers", "tensors that are no parameters"),
)
"""Parts of `bytes_by_part`: name in the record, class in the style, short name, what it is."""


def all_findings(record: Json) -> list[dict[str, Any]]:
    """Returns the findings of a record, worst first; of several precisions, with their labels."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    sources = [("", record["findings"])]
    sources += [(value["label"], value["findings"]) for value in record["precisions"].values()]
    if record.get("error"):
        sources.append(("quantisation error", record["error"]["findings"]))
    for label, findings in sources:
        for finding in findings:
            shown = {**finding}
            if label and shown["where"].startswith("bits="):
                shown["where"] = ""  # the label says it, and equal findings become one
            key = tuple(str(value) for value in shown.values())
            entry = found.setdefault(key, {**shown, "labels": []})
            if label:
                entry["labels"].append(label)
    return worst_first(found.values())


@dataclass(frozen=True, slots=True)
class LoraPlace:
    """Equal overlays on modules of one name.

    Args:
        name: Last part of the path.
        text: `LoRA(r=16)`.
        count: Modules.
        parameters: Added by all of them together, and the bytes below too.
    """

    name: str
    text: str
    count: int
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def training_bytes(self) -> int:
        """Weights, gradients and optimiser state together."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def lora_places(tree: Node) -> list[LoraPlace]:
    """Sums an adapter's overlay by the name of its modules, in the order of the model."""
    counts: dict[tuple[str, str], list[int]] = {}

    def walk(node: Node, name: str, times: int) -> None:
        lora = node.lora
        if lora is not None:
            sums = counts.setdefault((name, lora_text(lora)), [0] * 5)
            values = [1, *(lora[field] for field in _LORA_FIELDS)]
            for index, value in enumerate(values):
                sums[index] += times * value
        for child in node.children:
            walk(child.node, child.name, times * child.count)

    walk(tree, tree.row["class"], 1)
    return [LoraPlace(name, text, *sums) for (name, text), sums in counts.items()]


_LORA_FIELDS = ("parameters", "weight_bytes", "gradient_bytes", "optimizer_bytes")
