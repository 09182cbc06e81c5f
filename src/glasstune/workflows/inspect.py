"""`glasstune inspect`: a model's tree at several precisions with an adapter laid over it."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.config_load import config_from_mapping
from glasstune.core.errors import InputError
from glasstune.core.files import write_text_atomic
from glasstune.core.findings import Finding
from glasstune.core.inspection import InspectRecord, PrecisionRecord
from glasstune.core.protocols import Progress
from glasstune.workflows.inspect_target import Target, find_target, open_base

if TYPE_CHECKING:
    from collections.abc import Iterator

    from glasstune.adapters.overlay import Overlay
    from glasstune.models.inspect.source import ModelSource

BITS = (16, 8, 4)
_TASK = "inspect"
_LARGEST_TOKENIZER = 100 * 2**20


class Inspection:
    """The result: prints as the tree, is a page in a notebook.

    Args:
        record: All of it.
        depth: How many levels of the tree are printed; None for all.
    """

    def __init__(self, record: InspectRecord, depth: int | None = None) -> None:
        self.record = record
        self.depth = depth

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the contract."""
        return self.record.to_dict()

    def to_html(self, path: str | Path) -> Path:
        """Writes the page and returns where it is.

        Raises:
            InputError: `html_not_writable`.
        """
        from glasstune.reports.inspect_page import inspect_page

        place = check_html(path)
        write_text_atomic(place, inspect_page(self.record))
        return place

    def __str__(self) -> str:
        from glasstune.reports.inspect_tree import print_inspect
        from glasstune.reports.terminal import console_for

        text = io.StringIO()
        print_inspect(self.to_dict(), console_for(text), self.depth)
        return text.getvalue().rstrip("\n")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from glasstune.reports.inspect_page import inspect_page

        page = html.escape(inspect_page(self.record), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:40em;border:0"></iframe>'


@dataclass(frozen=True)
class _Options:
    """What the trees are made with."""

    quantization: Mapping[str, Any]
    dtype: str
    int8_compute: str


def inspect_model(
    target: Any,
    bits: int | Sequence[int] | None = None,
    *,
    target_modules: str | Sequence[str] | None = None,
    r: int | None = None,
    adapter: Mapping[str, Any] | None = None,
    skip_modules: str | Sequence[str] | None = None,
    quantization: Mapping[str, Any] | None = None,
    dtype: Any = None,
    error: bool = False,
    trust_remote_code: bool = False,
    depth: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Lays out a model at 16, 8 and 4 bit, exactly as a load would, without its weights.

    A run folder or a configuration of ours brings its precision, its options and its adapter; its
    own precision comes first. A live module is shown as it is, with its own adapter and its own
    `requires_grad`; the default adapter is laid over it only where nothing in it is trained yet.

    Args:
        target: Run folder, adapter folder, configuration, `config.json`, model folder, hub id,
            GGUF file, `nn.Module` or transformers config.
        bits: Any of 16, 8, 4, in the order of the columns; None for all that can be shown.
        target_modules: Of the adapter laid over the tree; `all-linear` by default.
        r: Its rank; 16 by default.
        adapter: More of `LoraConfig`'s options.
        skip_modules: `llm_int8_skip_modules`, one or several: replaces transformers' own list.
        quantization: More options of `BitsAndBytesConfig`; each precision takes its own.
        dtype: Load dtype, as a name or torch's own; bfloat16, or the run's.
        error: Whether the weights are read too, for the error of quantising them.
        trust_remote_code: Whether Python code of the checkpoint may run.
        depth: How many levels of the tree are printed.
        progress: Bars and log.

    Raises:
        InputError: Nothing that can be laid out is there, or an option is wrong. What would only
            stop a training run is a finding.
    """
    asked = _bits(bits)
    found = find_target(target)
    source = open_base(found, trust_remote_code=trust_remote_code)
    options = _options(found, skip_modules, quantization, dtype)
    given = _given(target_modules, r, adapter)
    from glasstune.models.inspect.precision import (
        precision_record,
        rule_text,
        supported_bits,
        versions,
    )

    wanted, left_out = supported_bits(source, asked or _own_first(found.bits))
    with _bar(progress, len(wanted) + 1) as advance:
        precisions = {}
        for count in wanted:
            precisions[str(count)] = precision_record(
                source,
                count,
                options.quantization,
                dtype=options.dtype,
                int8_compute=options.int8_compute,
            )
            advance()
        laid = _overlay(found, source, options, given)
        advance()
    for precision in precisions.values():
        _lay(precision, laid)
    trainable, total, line = _counts(source, laid, precisions)
    record = InspectRecord(
        model=found.name,
        family=_family(source),
        architecture=precisions[str(wanted[0])].modules[0].class_name,
        source=found.kind or source.kind,
        rule=rule_text(),
        versions=versions(),
        precisions=precisions,
        trainable_parameters=trainable,
        all_parameters=total,
        peft_line=line,
        adapter=None if laid is None else laid.options or None,
        findings=[
            *_of_run(found),
            *source.findings,
            *left_out,
            *_other_class(source, precisions),
            *_tokens(found, precisions),
            *(laid.findings if laid is not None else ()),
        ],
    )
    if error:
        record.error = _error(source, record, options, progress)
    return Inspection(record, depth)


def check_html(path: str | Path) -> Path:
    """Refuses a place where no page can be written.

    Raises:
        InputError: `html_not_writable`.
    """
    place = Path(path).expanduser()
    if not place.parent.is_dir() or place.is_dir():
        problem = "is a folder" if place.is_dir() else f"needs the folder {place.parent}"
        raise InputError(
            "html_not_writable", f"{path} {problem}", where="--html", fix="name a file"
        )
    return place


def _bits(bits: int | Sequence[int] | None) -> list[int]:
    if bits is None:
        return []
    listed = [bits] if isinstance(bits, int) else list(bits)
    if not listed or len(set(listed)) != len(listed) or not set(listed) <= set(BITS):
        raise InputError(
            "bad_value",
            f"bits is {', '.join(map(str, listed)) or 'empty'}",
            where="--bits",
            fix="give 16, 8 and 4, or some of them, each once",
        )
    return listed


def _own_first(own: int | None) -> list[int]:
    return sorted(BITS, key=lambda bits: (bits != own, -bits))


def _options(
    found: Target,
    skip_modules: str | Sequence[str] | None,
    quantization: Mapping[str, Any] | None,
    dtype: Any,
) -> _Options:
    """What a run or configuration says, with what is asked for over it."""
    model = found.model
    merged = {**(model.quantization if model else {}), **(quantization or {})}
    if skip_modules is not None:
        one = isinstance(skip_modules, str)  # its letters are no names
        merged["llm_int8_skip_modules"] = [skip_modules] if one else list(skip_modules)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        asked = {"model": {"path": "-", "dtype": name}, "data": {"sources": [{"path": "-"}]}}
        dtype = config_from_mapping(asked, name="option").config.model.dtype
    if model is None or found.bits is None:
        # Without a configuration the tree shows what bitsandbytes makes, not our w8a16.
        return _Options(merged, dtype or "bfloat16", "llm_int8")
    return _Options(merged, dtype or model.dtype, model.int8_compute)


def _given(
    target_modules: str | Sequence[str] | None, r: int | None, adapter: Mapping[str, Any] | None
) -> dict[str, Any]:
    given = dict(adapter or {})
    if target_modules is not None:
        is_text = isinstance(target_modules, str)
        given["target_modules"] = target_modules if is_text else list(target_modules)
    if r is not None:
        given["r"] = r
    return given


@contextmanager
def _bar(progress: Progress | None, total: int) -> Iterator[Any]:
    if progress is None:
        yield lambda: None
        return
    progress.start(_TASK, total, "steps")
    yield lambda: progress.advance(_TASK)
    progress.finish(_TASK)


def _overlay(
    found: Target, source: ModelSource, options: _Options, given: dict[str, Any]
) -> Overlay | None:
    """The adapter over the tree: a live one, the run's, or a new one; None where none belongs."""
    from glasstune.adapters.overlay import carries_adapter, existing_overlay, no_overlay, overlay
    from glasstune.models.inspect.dry_run import skeleton
    from glasstune.models.inspect.precision import supported_bits

    live = source.module
    if live is not None and carries_adapter(live):
        if given:
            raise InputError(
                "contradiction",
                f"the module carries an adapter already, and {', '.join(given)} asks for another",
                where=found.name,
                fix="leave them out, or give the plain model",
            )
        return existing_overlay(live)
    if live is not None and not given:
        trained = any(parameter.requires_grad for parameter in live.parameters())
        if trained or source.config is None:
            return None
    # LoRA is the same at every precision; 16 bit, where the source has it, needs no unpacking.
    (bits,), _ = supported_bits(source, (16,))
    plain = skeleton(source, bits, options.quantization, dtype=options.dtype)
    asked = {**(found.adapter or {}), **given}
    try:
        return overlay(plain, asked, optim=found.optim)
    except InputError as error:
        if asked or error.code != "adapter_refused":
            raise
        # Nobody asked for this adapter: the tree is worth seeing without it.
        where = "target_modules=all-linear"
        fix = "name others with --target-modules"
        plain = skeleton(source, bits, options.quantization, dtype=options.dtype)
        return no_overlay(plain, Finding(error.code, "warning", where, error.message, fix))


def _lay(precision: PrecisionRecord, laid: Overlay | None) -> None:
    if laid is None:
        return
    from glasstune.adapters.overlay_findings import precision_traps

    for row in precision.modules:
        row.lora = laid.rows.get(row.path)
        row.trainable = row.path in laid.trained
    precision.adapter_bytes = laid.bytes
    precision.findings.extend(precision_traps(precision, laid.rows))


def _counts(
    source: ModelSource, laid: Overlay | None, precisions: Mapping[str, PrecisionRecord]
) -> tuple[int, int, str]:
    """Trainable and all parameters, and PEFT's line of them."""
    if laid is not None:
        return laid.trainable_parameters, laid.all_parameters, laid.peft_line
    from glasstune.adapters.overlay import count_parameters, peft_line

    assert source.module is not None
    trainable, total = count_parameters(source.module)
    return trainable, total, peft_line(trainable, total)


def _family(source: ModelSource) -> str:
    if source.config is not None:
        return str(source.config.model_type)
    return type(source.module).__name__


def _of_run(found: Target) -> list[Finding]:
    if found.bits is None or found.model is None:
        return []
    what = "run" if found.kind == "run" else "adapter" if found.kind else "configuration"
    return [
        Finding(
            "trained_precision",
            "info",
            found.name,
            f"this {what} trains {found.model.path} at {found.bits} bit in {found.model.dtype}",
        )
    ]


def _other_class(source: ModelSource, precisions: Mapping[str, PrecisionRecord]) -> list[Finding]:
    """The config names another class than that of the tree: a classifier, a model with vision."""
    named = getattr(source.config, "architectures", None)
    shown = next(iter(precisions.values())).modules[0].class_name
    if source.module is not None or not named or shown in named:
        return []
    return [
        Finding(
            "other_class",
            "warning",
            source.name,
            f"the config names {named[0]}; shown and trained is {shown}, the causal language model",
            "what else the checkpoint holds (a classifier's head, an encoder, vision) is left out",
        )
    ]


def _tokens(found: Target, precisions: Mapping[str, PrecisionRecord]) -> list[Finding]:
    """Tokens beyond the embedding's rows: they get new rows, which LoRA leaves untrained."""
    if found.tokenizer is None:
        return []
    highest = _highest_id(found.tokenizer)
    modules = next(iter(precisions.values())).modules
    table = next((row for row in modules if row.class_name.endswith("Embedding")), None)
    if highest is None or table is None or not table.shape or highest < table.shape[0]:
        return []
    trained = table.lora is not None
    return [
        Finding(
            "tokens_without_rows",
            "info" if trained else "warning",
            str(found.tokenizer),
            f"the tokenizer has ids up to {highest:,}, {table.path} has {table.shape[0]:,} rows: "
            "rows added for them would start untrained, and LoRA on other layers leaves them so",
            "resize the embedding in the base first, then train the new rows: "
            "adapter.trainable_token_indices or modules_to_save",
        )
    ]


def _highest_id(folder: Path) -> int | None:
    """Returns the highest id that a tokenizer's own files name, None where none is readable."""
    ids: list[int] = []
    try:
        file = folder / "tokenizer.json"
        if file.is_file() and file.stat().st_size < _LARGEST_TOKENIZER:
            content = json.loads(file.read_text(encoding="utf-8"))
            ids += [int(token["id"]) for token in content.get("added_tokens", ())]
            vocabulary = content.get("model", {}).get("vocab", {})
            if isinstance(vocabulary, dict):
                ids += map(int, vocabulary.values())
            else:
                ids.append(len(vocabulary) - 1)
        file = folder / "tokenizer_config.json"
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            ids += map(int, content.get("added_tokens_decoder", {}))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # a broken tokenizer is not this command's matter
    return max(ids, default=None)


def _error(
    source: ModelSource, record: InspectRecord, options: _Options, progress: Progress | None
) -> Any:
    from glasstune.models.inspect.error import quantization_error
    from glasstune.models.inspect.precision import precision_record

    tree = record.precisions.get("4") or record.precisions.get("8")
    if tree is None:
        tree = precision_record(source, 4, options.quantization, dtype=options.dtype)
    leaves = [
        (row.path, list(row.shape))
        for row in tree.modules
        if row.shape and row.class_name != row.original_class
    ]
    return quantization_error(source, leaves, dtype=options.dtype, progress=progress)
