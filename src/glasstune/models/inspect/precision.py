"""A model's tree at one precision, as a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from glasstune.core.findings import Finding
from glasstune.core.inspection import ModuleRow, PrecisionRecord
from glasstune.models.inspect.dry_run import Skeleton, build
from glasstune.models.inspect.findings import precision_findings
from glasstune.models.inspect.live import shared_view
from glasstune.models.inspect.plan import DTYPES, Plan, make_plan, own_bits
from glasstune.models.inspect.reasons import Conversion, explain, rule_text, versions
from glasstune.models.inspect.sizes import Ledger, OwnTensors, model_dtype
from glasstune.models.inspect.source import ModelSource, own_quantization, quantization_method
from glasstune.models.skips import tied_partners

__all__ = ["precision_record", "rule_text", "supported_bits", "versions"]

_KINDS = ("16bit", "8bit", "4bit", "scales", "code", "buffers")
_PARTS = ("weights", "scales", "code", "bias", "buffers")


def supported_bits(
    source: ModelSource, asked: Iterable[int] = (16, 8, 4)
) -> tuple[list[int], list[Finding]]:
    """Returns the precisions that a source can be shown at, and what is said of the others.

    A quantised checkpoint of bitsandbytes and a quantised module have one precision, shown whether
    it was asked for or not; a checkpoint of another method is shown at 16 bit only.

    Args:
        source: What `open_source` found.
        asked: Precisions in the order of the report.

    Raises:
        InputError: Nothing; `precision_record` refuses what is left out here.
    """
    wanted = list(dict.fromkeys(asked))
    own = own_bits(source)
    foreign = _foreign_method(source)
    if own is None and not foreign:
        return wanted, []
    kept = 16 if own is None else own
    left = [bits for bits in wanted if bits != kept]
    if not left:
        return [kept], []
    state = f"stored by {foreign}" if foreign else f"quantised to {own} bit already"
    finding = Finding(
        "precision_left_out",
        "info",
        source.name,
        f"{_listed(left)} bit left out: the model is {state}",
        "inspect the unquantised checkpoint for the other precisions",
    )
    return [kept], [finding]


def precision_record(
    source: ModelSource,
    bits: int,
    quantization: Mapping[str, Any] = {},
    *,
    dtype: str = "bfloat16",
    int8_compute: str = "llm_int8",
) -> PrecisionRecord:
    """Lays out the model at one precision; no weight is read.

    Args:
        source: What `open_source` found.
        bits: 16, 8 or 4; see `supported_bits`.
        quantization: Options of `BitsAndBytesConfig`; those of another precision are left out.
        dtype: Load dtype of a checkpoint. A live module keeps its own types.
        int8_compute: `llm_int8` or `w8a16`.

    Returns:
        The record; every row's `lora` is None. Of a live module at the precision that it already
        has, bytes are those of its real tensors. Rows are those of the base model: adapters of
        PEFT are left out and their wrappers stand under the wrapped layer's name.

    Raises:
        InputError: As `dry_run.skeleton`.
    """
    plan = make_plan(source, bits, quantization, dtype=dtype, int8_compute=int8_compute)
    live = source.module
    if live is not None and not plan.quantizes:
        view = shared_view(live)
        built = Skeleton(view, dict(view.named_modules()), {})
    else:
        built = build(source, plan, dtype=dtype)
    load = DTYPES[dtype] if live is None else model_dtype(built.model)
    rows, owned = _rows(built, plan, load)
    stored: Counter[str] = Counter()
    for own in owned.values():
        stored.update(own.stored)
    parameters = sum(own.parameters for own in owned.values())
    kept = sum(own.kept for own in owned.values())
    record = PrecisionRecord(
        bits=bits,
        label=_label(plan, rows, load),
        quantization=plan.options(),
        total_bytes=sum(row.bytes for row in rows),
        bytes_by_part={kind: stored[kind] for kind in _KINDS if stored[kind]},
        kept_parameters=kept,
        kept_share=kept / parameters if parameters else 0.0,
        largest_transient_bytes=max((row.transient_bytes for row in rows), default=0),
        adapter_bytes=0,
        modules=rows,
    )
    record.findings.extend(precision_findings(record, built, plan, owned))
    return record


def _rows(
    built: Skeleton, plan: Plan, dtype: torch.dtype
) -> tuple[list[ModuleRow], dict[str, OwnTensors]]:
    ledger = Ledger(dtype)
    what = _conversion(built, plan)
    rows, owned = [], {}
    for path, module in built.model.named_modules():
        own = owned[path] = ledger.own(path, module)
        original = built.before.get(path, module)
        code, reason = explain(path, module, original, own.tied_to, what)
        rows.append(
            ModuleRow(
                path=path,
                class_name=type(module).__name__,
                original_class=_original_class(module, original),
                detail=_detail(module),
                container=bool(module._modules),
                shape=own.shape,
                dtype=own.dtype,
                bytes=sum(own.parts.values()),
                parts={part: own.parts[part] for part in _PARTS if own.parts[part]},
                parameters=own.parameters,
                transient_bytes=own.transient,
                trainable=own.trainable,
                tied_to=own.tied_to,
                reason_code=code,
                reason=reason,
            )
        )
    return rows, owned


def _conversion(built: Skeleton, plan: Plan) -> Conversion:
    model = built.model
    find = getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) else None
    head = None
    if output is not None:
        head = next((path for path, part in model.named_modules() if part is output), None)
    partners = tied_partners(model)
    already = not plan.quantizes and plan.bits != 16
    return Conversion(plan.quantizes or already, built.keys, partners, head, already)


def _original_class(module: nn.Module, original: nn.Module) -> str:
    """Returns the class at 16 bit; a layer that came quantised may remember what it was."""
    if original is not module:
        return type(original).__name__
    source = getattr(module, "source_cls", None)
    if isinstance(source, type):
        return source.__name__
    quantized = type(module).__name__ in ("Linear4bit", "Linear8bitLt", "Int8Linear")
    return "Linear" if quantized else type(module).__name__


def _detail(module: nn.Module) -> str:
    """Returns what `print(model)` shows between a module's brackets."""
    detail = module.extra_repr()
    if detail or module._modules:
        return " ".join(detail.split())
    # Some classes, as transformers' Conv1D, write their whole line themselves.
    text = repr(module)
    start = text.find("(")
    return " ".join(text[start + 1 : text.rfind(")")].split()) if start >= 0 else ""


def _label(plan: Plan, rows: list[ModuleRow], dtype: torch.dtype) -> str:
    plain = str(dtype).removeprefix("torch.")
    if plan.w8a16:
        return "int8, w8a16"
    if plan.config is None:
        kinds = Counter(row.dtype for row in rows if row.dtype in ("nf4", "fp4", "int8"))
        return kinds.most_common(1)[0][0].upper() if kinds else plain
    if plan.bits == 8:
        label = "LLM.int8"
        if plan.config.llm_int8_has_fp16_weight:
            label += f", weights kept in {plain}"
    else:
        label = str(plan.config.bnb_4bit_quant_type).upper()
        if plan.config.bnb_4bit_use_double_quant:
            label += ", double quantisation"
    return f"{label} (the checkpoint's own)" if plan.own else label


def _foreign_method(source: ModelSource) -> str:
    """Returns the name of a quantisation that is not bitsandbytes', "" where there is none."""
    from glasstune.models.inspect.live import foreign_quantization

    if source.module is not None:
        return foreign_quantization(source.module)
    own = own_quantization(source.config)
    method = "" if own is None else quantization_method(own)
    return "" if method == "bitsandbytes" else method


def _listed(bits: list[int]) -> str:
    return " and ".join(str(count) for count in bits)
