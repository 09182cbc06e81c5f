"""Traps of an adapter, seen in the tree before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft import PeftModel
from torch import Tensor, nn

from glasstune.adapters.inject import adapter_findings
from glasstune.core.findings import Finding
from glasstune.core.inspection import LoraOverlay, PrecisionRecord
from glasstune.models.classes import Conv1D


def tied_weights(model: PeftModel) -> list[Finding]:
    """One of head and embedding is adapted while they share a weight."""
    base = model.get_base_model()
    known = hasattr(base, "get_output_embeddings") and hasattr(base, "config")
    return adapter_findings(model) if known else []


def rank_above_size(
    modules: Mapping[str, nn.Module], rows: Mapping[str, LoraOverlay]
) -> list[Finding]:
    """A rank so high that the adapter holds more than the weight it adapts.

    Args:
        modules: The plain base's modules by path.
        rows: What the adapter adds, by path.
    """
    larger = [
        (path, row.parameters, weight.numel())
        for path, row in rows.items()
        if row.r is not None
        and isinstance(weight := getattr(modules.get(path), "weight", None), Tensor)
        and row.parameters > weight.numel()
    ]
    if not larger:
        return []
    path, adapter, weight_count = larger[0]
    return [
        Finding(
            code="rank_above_size",
            severity="info",
            where="adapter.r",
            message=f"on {len(larger)} modules LoRA holds more parameters than the weight itself, "
            f"for example {path}: {adapter:,} for {weight_count:,}",
            fix="lower r, or set rank_pattern for them",
        )
    ]


def saved_module_broad(asked: Sequence[str], rows: Mapping[str, LoraOverlay]) -> list[Finding]:
    """An entry of `modules_to_save` that hits more: PEFT compares bare endings of paths.

    Args:
        asked: The list.
        rows: What the adapter adds, by path.
    """
    saved = [path for path, row in rows.items() if "modules_to_save" in row.kind]
    meant = [path for path in saved if any(f".{name}." in f".{path}." for name in asked)]
    more = [path for path in saved if path not in meant]
    if not more:
        return []
    return [
        Finding(
            code="saved_module_broad",
            severity="warning",
            where="adapter.modules_to_save",
            message=f"modules_to_save matches bare endings: {', '.join(asked)} also trains "
            f"{len(more)} modules of other names, {_some(more)}",
            fix="write the whole path of what is meant",
        )
    ]


def experts_not_adapted(
    modules: Mapping[str, nn.Module], rows: Mapping[str, LoraOverlay], all_parameters: int
) -> list[Finding]:
    """A mixture whose experts, stacked 3-D parameters, LoRA does not reach.

    Args:
        modules: The plain base's modules by path.
        rows: What the adapter adds, by path.
        all_parameters: Of base and adapter.
    """
    left = {
        f"{path}.{name}": parameter.numel()
        for path, module in modules.items()
        if path not in rows
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }
    if not left:
        return []
    names = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in left))
    return [
        Finding(
            code="experts_not_adapted",
            severity="info",
            where="adapter.target_modules",
            message=f"LoRA leaves the experts alone ({names}): "
            f"{sum(left.values()) / all_parameters:.1%} of all parameters are in stacked 3-D "
            "tensors, which are no linear modules",
            fix="name them in target_parameters to adapt them too",
        )
    ]


def linear_not_adapted(
    modules: Mapping[str, nn.Module], expected: set[str], rows: Mapping[str, LoraOverlay]
) -> list[Finding]:
    """Linear layers that the targets name and that PEFT leaves alone all the same.

    Of a mixture whose experts are stacked, PEFT makes parameters of the names that experts once
    had (`gate_proj`, `up_proj`, `down_proj`): dense layers and shared experts of those names then
    get nothing.

    Args:
        modules: The plain base's modules by path.
        expected: Paths of what the targets name.
        rows: What the adapter adds, by path.
    """
    left = [
        path
        for path in modules
        if path in expected and path not in rows and isinstance(modules[path], (nn.Linear, Conv1D))
    ]
    if not left:
        return []
    names = dict.fromkeys(".".join(path.split(".")[-2:]) for path in left)
    return [
        Finding(
            code="linear_not_adapted",
            severity="warning",
            where="adapter.target_modules",
            message=f"PEFT leaves {len(left)} linear layers alone that the targets name, "
            f"{_some(left)}: it takes their names for the stacked experts' parameters",
            fix="name their weights too: adapter.target_parameters="
            f"[{', '.join(f'{name}.weight' for name in names)}]",
        )
    ]


def precision_traps(precision: PrecisionRecord, rows: Mapping[str, LoraOverlay]) -> list[Finding]:
    """Traps of an adapter over a base that is quantised.

    Args:
        precision: The base's tree.
        rows: What the adapter adds, by path.
    """
    quantized = {row.path for row in precision.modules if row.class_name != row.original_class}
    if not quantized:
        return []
    findings = []
    where = f"bits={precision.bits}"
    saved = [path for path, row in rows.items() if "modules_to_save" in row.kind]
    broken = [path for path in saved if path in quantized]
    if broken:
        findings.append(
            Finding(
                code="saved_module_quantized",
                severity="error",
                where=where,
                message=f"modules_to_save trains {_some(broken)} whole, which is stored at "
                f"{precision.bits} bit: integers take no gradient",
                fix="take it out (LoRA can adapt it), or keep it in 16 bit with skip_modules",
            )
        )
    targets = [path for path, row in rows.items() if row.r is not None]
    plain = [path for path in targets if path not in quantized]
    if plain:
        findings.append(
            Finding(
                code="target_not_quantized",
                severity="info",
                where=where,
                message=f"{len(plain)} of {len(targets)} LoRA targets stay in 16 bit: "
                f"{_some(plain)}",
            )
        )
    return findings


def _some(paths: list[str]) -> str:
    rest = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
    return ", ".join(paths[:2]) + rest
