"""Traps of a base model and its precision, as findings."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from glasstune.core.choices import WARNING
from glasstune.core.findings import Finding, Severity
from glasstune.core.inspection import PrecisionRecord
from glasstune.core.units import format_bytes
from glasstune.models.families.native import native_choices
from glasstune.models.inspect.sizes import OwnTensors

if TYPE_CHECKING:
    from glasstune.models.inspect.dry_run import Skeleton
    from glasstune.models.inspect.plan import Plan
    from glasstune.models.inspect.source import ModelSource

WARN_SHARE = 0.5
"""Share of parameters left at 16 bit from which the finding is a warning."""
_QUANTIZED = ("Linear4bit", "Linear8bitLt", "Int8Linear")


def source_findings(source: ModelSource) -> list[Finding]:
    """Returns what holds at every precision."""
    from glasstune.models.inspect.live import foreign_quantization, live_bits
    from glasstune.models.inspect.source import own_quantization, quantization_method, stored_bytes

    found: list[Finding] = []
    if source.module is not None:
        foreign, bits = foreign_quantization(source.module), live_bits(source.module)
        if foreign or bits != 16:
            state = f"by {foreign} layers" if foreign else f"to {bits} bit"
            says = f"the module is quantised {state} already; its real tensors are shown"
            found.append(Finding("module_quantized", "info", source.name, says))
        return found
    own = own_quantization(source.config)
    if own is not None:
        method = quantization_method(own)
        if method == "bitsandbytes":
            bits = 4 if own.get("load_in_4bit") else 8
            says = f"the checkpoint is quantised to {bits} bit by bitsandbytes; its settings win"
            found.append(Finding("checkpoint_quantized", "warning", source.name, says))
        else:
            says = f"the checkpoint is stored by {method}; the tree shows the 16-bit model"
            if source.weights is not None:
                stored = stored_bytes(source.weights)
                says += f", the files hold {stored:,} bytes ({format_bytes(stored)}) of tensors"
            fix = "Glasstune trains 16-bit checkpoints and those of bitsandbytes"
            found.append(Finding("checkpoint_quantized", "warning", source.name, says, fix))
    if source.kind == "gguf":
        says = "a GGUF file is expanded to bfloat16 before it is loaded; that is what is shown"
        found.append(Finding("gguf_expanded", "info", source.name, says))
    for choice in native_choices(source.config):
        severity: Severity = "warning" if choice.reason.startswith(WARNING) else "info"
        why = choice.reason.removeprefix(WARNING)
        says = f"{choice.name.removeprefix('model.')}: {choice.value} ({why})"
        found.append(Finding("native_family", severity, source.name, says))
    kind = str(getattr(source.config, "model_type", ""))
    if "bert" in kind and getattr(source.config, "is_decoder", None) is False:
        says = f"{kind} is an encoder: every token sees those behind it (is_decoder is false)"
        fix = "give a decoder such as llama, qwen2 or gpt2"
        found.append(Finding("not_a_decoder", "warning", source.name, says, fix))
    return found


def precision_findings(
    record: PrecisionRecord, built: Skeleton, plan: Plan, owned: Mapping[str, OwnTensors]
) -> list[Finding]:
    """Returns the traps of one precision.

    Args:
        record: The tree, its findings not yet filled.
        built: The skeleton before and after.
        plan: What was applied.
        owned: What each module holds, by path.
    """
    if not plan.quantizes:
        return []
    where = f"bits={plan.bits}"
    converted = [row for row in record.modules if row.class_name in _QUANTIZED]
    found: list[Finding] = []
    if not plan.own:
        found += _skip_findings(built, plan)
    if not converted:
        return [_nothing_converted(record, where), *found]
    found.append(_kept(record, where))
    found += _head_findings(built, plan, record)
    found += _double_findings(owned, where)
    if any(row.class_name == "Linear8bitLt" for row in converted):
        found.append(
            Finding(
                "int8_checkpointing",
                "info",
                where,
                "LLM.int8 keeps the inputs of its layers for the backward in a way that gradient "
                "checkpointing does not free, so that checkpointing saves less than it should",
                "set model.int8_compute=w8a16, which keeps no input",
            )
        )
    return found


def _nothing_converted(record: PrecisionRecord, where: str) -> Finding:
    subclasses = Counter(
        row.class_name for row in record.modules if row.reason_code == "linear_subclass"
    )
    why = ""
    if subclasses:
        name, count = subclasses.most_common(1)[0]
        why = f": its {count} {name} layers are a subclass of nn.Linear"
    skipped = sum(row.reason_code == "skip_list" for row in record.modules)
    if skipped:
        why += f"{';' if why else ':'} the skip list holds {skipped} layers"
    return Finding(
        "nothing_converted",
        "error",
        where,
        f"no layer converts{why}; all {record.kept_parameters:,} parameters stay at 16 bit and a "
        "training run at this precision stops",
        "set bits to 16",
    )


def _kept(record: PrecisionRecord, where: str) -> Finding:
    """Says which share stays, and what most of it is."""
    kinds: Counter[str] = Counter()
    for row in record.modules:
        if row.class_name not in _QUANTIZED and row.parameters:
            kinds[_leaf_name(row.path) or row.class_name] += row.parameters
    total = record.kept_parameters
    largest = ", ".join(
        f"{name} {count:,}" for name, count in kinds.most_common(3) if count * 50 >= total
    )
    much = record.kept_share > WARN_SHARE
    return Finding(
        "kept_at_16bit",
        "warning" if much else "info",
        where,
        f"{record.kept_share:.1%} of parameters ({total:,}) stay at 16 bit"
        f"{f': {largest}' if largest else ''}",
        "the memory hardly falls: use 16 bit, or a model whose weights are Linear layers"
        if much
        else "",
    )


def _head_findings(built: Skeleton, plan: Plan, record: PrecisionRecord) -> list[Finding]:
    """The user's skip list replaced the default one, which held the head."""
    find = getattr(built.model, "get_output_embeddings", None)
    output = find() if callable(find) else None
    if output is None or plan.skip is None:
        return []
    path = next((name for name, part in built.model.named_modules() if part is output), "")
    row = next((row for row in record.modules if row.path == path), None)
    if row is None or row.class_name not in _QUANTIZED:
        return []
    fix = f"add {path!r} to llm_int8_skip_modules"
    if row.tied_to is not None:
        return [
            Finding(
                "tied_head_raises",
                "error",
                path,
                f"the skip list replaces transformers' own, so {path} becomes {row.class_name} "
                f"while its weight stays the 16-bit {row.tied_to}: the first forward raises "
                "(transformers#45674)",
                fix,
            )
        ]
    return [
        Finding(
            "head_quantized",
            "warning",
            path,
            f"the skip list replaces transformers' own, so the output head {path} is quantised too",
            fix,
        )
    ]


def _skip_findings(built: Skeleton, plan: Plan) -> list[Finding]:
    """Keys of the user's list that hit nothing, or more kinds of layers than they name."""
    from glasstune.models.inspect.reasons import is_eligible
    from glasstune.models.skips import matches

    layers = [path for path, module in built.before.items() if is_eligible(module)]
    found: list[Finding] = []
    for key in plan.skip or ():
        hits = [path for path in layers if matches(path, key)]
        kinds = sorted({_leaf_name(path) for path in hits})
        if not hits:
            found.append(_hits_nothing(key, layers, built.before))
        elif len(kinds) > 1 and any(not _at_boundary(path, key) for path in hits):
            found.append(
                Finding(
                    "skip_key_broad",
                    "warning",
                    f"llm_int8_skip_modules: {key}",
                    f"the skip key {key!r} matches as a bare ending: it hits {len(kinds)} kinds of "
                    f"layers ({', '.join(kinds)}), {len(hits)} in all",
                    "write the whole name of what is meant",
                )
            )
    return found


def _hits_nothing(key: str, layers: list[str], modules: Mapping[str, nn.Module]) -> Finding:
    inside = [path for path in modules if key in path.split(".") and _leaf_name(path) == key]
    if inside:
        says = f"it names {len(inside)} modules, but a layer inside one is not left out by it"
        fix = f"write a pattern that reaches the layers: '.*\\.{key}\\..*'"
    else:
        names = sorted({_leaf_name(path) for path in layers})
        near = difflib.get_close_matches(key, names, n=1)
        says = "no Linear layer has such a name"
        fix = f"did you mean {near[0]!r}?" if near else f"layers are called {', '.join(names[:8])}"
    return Finding(
        "skip_key_hits_nothing",
        "warning",
        f"llm_int8_skip_modules: {key}",
        f"the skip key {key!r} hits nothing: {says}",
        fix,
    )


def _at_boundary(path: str, key: str) -> bool:
    """Whether a key stands at whole names of a path, so that it hits what it says."""
    return path == key or path.endswith(f".{key}") or not path.endswith(key)


def _double_findings(owned: Mapping[str, OwnTensors], where: str) -> list[Finding]:
    larger = {path: own.double_extra for path, own in owned.items() if own.double_extra}
    if not larger:
        return []
    kinds = Counter(_leaf_name(path) or path or "the layer itself" for path in larger)
    count = "1 layer" if len(larger) == 1 else f"{len(larger)} layers"
    named = ", ".join(f"{times} x {name}" for name, times in kinds.most_common(5))
    return [
        Finding(
            "double_quantization_larger",
            "info",
            where,
            f"double quantisation is larger than plain on {count} ({named}): its "
            f"table of 1,024 bytes a layer adds {sum(larger.values()):,} bytes there",
            "on so small layers set bnb_4bit_use_double_quant=false",
        )
    ]


def _leaf_name(path: str) -> str:
    """Returns a path's last name that is not a number."""
    names = [name for name in path.split(".") if name and not name.isdigit()]
    return names[-1] if names else ""
