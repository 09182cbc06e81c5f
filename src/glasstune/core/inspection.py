"""The record of `glasstune inspect`: a model's tree at several precisions, without weights.

Sizes are bytes of storage. Parameters are counted by logical shape: a 4-bit weight of 4096 x 4096
counts 16,777,216 although its packed tensor has half as many elements. A tied weight counts once,
at the module that comes first in the tree.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from glasstune.core.findings import Finding
from glasstune.core.records import Record


@dataclass(slots=True)
class LoraOverlay:
    """What an adapter adds at one module.

    Args:
        kind: `lora`, `dora`, `modules_to_save`, `bias`, `trainable_tokens`, ...
        r: Rank; None where the module is trained whole.
        lora_alpha: Numerator of the scale; None where the module is trained whole.
        parameters: Trained parameters added.
        weight_bytes: Of them, as stored while training (float32 masters).
        gradient_bytes: Of their gradients.
        optimizer_bytes: Of their optimiser state (AdamW: two moments).
    """

    kind: str
    r: int | None
    lora_alpha: float | None
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


@dataclass(slots=True)
class ModuleRow:
    """One module of the tree, in the order of `named_modules`; a container holds others.

    Args:
        path: Dotted name; "" is the model itself.
        class_name: Class at this precision (`class` in JSON).
        original_class: Class at 16 bit.
        detail: What `print(model)` shows in the brackets (`in_features=..., bias=False`).
        container: Whether it has child modules.
        shape: Logical shape of its `weight`, or of its largest own parameter; None without one.
        dtype: `bfloat16`, `int8`, `nf4`, `fp4`, ...; empty without parameters.
        bytes: Own tensors (not those of children), tied ones once.
        parts: The same by part: `weights`, `scales`, `code`, `bias`, `buffers`; zeros left out.
        parameters: Own parameters by logical shape, tied ones once.
        transient_bytes: What one forward of it expands to for a moment; 0 where nothing expands.
        trainable: Whether an own parameter needs a gradient.
        tied_to: Path of the parameter that it shares and that is counted there, or None.
        reason_code: Stable name of why it converts or stays; empty for a container without
            own parameters.
        reason: The same as a sentence.
        lora: What the adapter adds here, or None.
    """

    path: str
    class_name: str
    original_class: str
    detail: str
    container: bool
    shape: list[int] | None
    dtype: str
    bytes: int
    parts: dict[str, int]
    parameters: int
    transient_bytes: int
    trainable: bool
    tied_to: str | None
    reason_code: str
    reason: str
    lora: LoraOverlay | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object; the class goes by the contract's name."""
        content = asdict(self)
        return {
            "path": content.pop("path"),
            "class": content.pop("class_name"),
            **content,
        }


@dataclass(slots=True)
class PrecisionRecord:
    """The tree at one precision.

    Args:
        bits: 16, 8 or 4.
        label: For people: `bfloat16`, `LLM.int8`, `NF4, double quantisation`, ...
        quantization: Options of `BitsAndBytesConfig` that were applied; empty at 16 bit.
        total_bytes: All tensors of the model, buffers included, adapter not.
        bytes_by_part: `16bit` (weights and biases not quantised), `8bit`, `4bit` (packed
            weights), `scales`, `code` (tables), `buffers`; zeros left out.
        kept_parameters: Logical parameters that stay unquantised (all of them at 16 bit).
        kept_share: The same as a share of all, 0 to 1.
        largest_transient_bytes: The largest expansion of one module.
        adapter_bytes: Adapter, its gradients and its optimiser state together.
        modules: The tree.
        findings: Traps of this precision.
    """

    bits: int
    label: str
    quantization: dict[str, Any]
    total_bytes: int
    bytes_by_part: dict[str, int]
    kept_parameters: int
    kept_share: float
    largest_transient_bytes: int
    adapter_bytes: int
    modules: list[ModuleRow]
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object."""
        return {
            **{
                name: getattr(self, name)
                for name in self.__slots__
                if name not in ("modules", "findings")
            },
            "modules": [row.to_dict() for row in self.modules],
            "findings": [finding.to_dict() for finding in self.findings],
        }


@dataclass(slots=True)
class LayerError:
    """How far quantisation moves one weight.

    Args:
        path: Of the module.
        shape: Of its weight, logical.
        errors: By `8`, `nf4`, `fp4`, `nf4_double`: the Frobenius norm of (Q(W) - W) over that
            of W.
        worst_row: The same for the output row where it is largest.
    """

    path: str
    shape: list[int]
    errors: dict[str, float]
    worst_row: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class ErrorReport:
    """Quantisation error of every layer that would be quantised, worst (by nf4) first.

    Args:
        layers: One entry a layer.
        mean: By precision: the norm of all differences over the norm of all weights.
        source: Where the weights were read.
        seconds: How long it took.
        findings: For example layers that could not be read.
    """

    layers: list[LayerError]
    mean: dict[str, float]
    source: str
    seconds: float
    findings: list[Finding] = field(default_factory=list)


SourceKind = Literal["config", "folder", "hub", "gguf", "run", "adapter", "module"]


@dataclass(slots=True)
class InspectRecord(Record):
    """Result of `glasstune inspect`.

    Args:
        model: As the user named it.
        family: `model_type` of the config; the class name for a module without one.
        architecture: Class of the model.
        source: Where the tree came from.
        rule: Which conversion rule was applied, with the version of transformers.
        versions: Of transformers, bitsandbytes, peft and torch.
        precisions: `"16"`, `"8"`, `"4"` to the tree there, in the order asked for.
        trainable_parameters: Of the adapter (and what else is trained).
        all_parameters: Of base and adapter, logical.
        peft_line: `print_trainable_parameters` in PEFT's wording.
        adapter: Options of the adapter laid over the tree; None without one.
        findings: What holds for every precision.
        error: Quantisation error, where it was asked for.
    """

    model: str
    family: str
    architecture: str
    source: SourceKind
    rule: str
    versions: dict[str, str]
    precisions: dict[str, PrecisionRecord]
    trainable_parameters: int
    all_parameters: int
    peft_line: str
    adapter: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)
    error: ErrorReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the contract."""
        content: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        content["precisions"] = {key: value.to_dict() for key, value in self.precisions.items()}
        content["findings"] = [finding.to_dict() for finding in self.findings]
        content["error"] = None if self.error is None else asdict(self.error)
        return content
