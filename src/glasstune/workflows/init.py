"""`glasstune init`: reads a model's config and a data file's first rows, writes a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from glasstune.core.choices import Choices
from glasstune.core.config import SourceConfig
from glasstune.core.config_fields import show_default
from glasstune.core.config_load import load_text
from glasstune.core.errors import InputError
from glasstune.core.files import write_text_atomic

_PEEK = 200
"""Rows whose lengths are looked at."""


@dataclass(slots=True)
class InitResult:
    """A written config.

    Args:
        text: The YAML.
        notes: What was translated or found.
        lost: What of `--from` has no counterpart.
        output: Where it was written.
    """

    text: str
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object that `--json` writes."""
        return {
            "ok": True,
            "config": self.text,
            "translated": self.notes,
            "no_counterpart": self.lost,
            "output": self.output,
        }


def init(
    model: str | None,
    data: str | None,
    *,
    output: Path | None = None,
    from_file: Path | str | None = None,
    trust_remote_code: bool = False,
) -> InitResult:
    """Writes a short commented config.

    Args:
        model: Hub id, folder or GGUF file; may come from `from_file`.
        data: File, glob or hub id; may come from `from_file`.
        output: Where the config goes; it must not exist.
        from_file: What to translate: a file with a LLaMA-Factory or Axolotl YAML or a command
            line, `-` for standard input, or a command line itself.
        trust_remote_code: Whether Python code of the checkpoint may run.

    Raises:
        InputError: Model or data cannot be read, or the output exists.
    """
    if output is not None and output.exists():
        raise InputError(
            "output_exists", "there is a file already", where=str(output), fix="name another file"
        )
    if output is not None and not output.parent.is_dir():
        raise InputError(
            "no_folder", "its folder does not exist", where=str(output), fix="make it first"
        )
    if from_file is not None:
        result = _translated(from_file, model, data)
    elif model is None or data is None:
        missing = "--model" if model is None else "--data"
        raise InputError(
            "missing_option",
            f"{missing} is missing",
            where="command line",
            fix="glasstune init --model M --data F, or --from FILE",
        )
    else:
        result = _looked_at(model, data, trust_remote_code)
    load_text(result.text, "the written config" if from_file is None else "the translation")
    if output is not None:
        write_text_atomic(output, result.text)
        result.output = str(output)
    return result


def _looked_at(model: str, data: str, trust: bool) -> InitResult:
    facts, found, choices = _model_facts(model, trust)
    rows = _data_facts(data, facts)
    lines = [
        f"# {found['family']} model, {found['sentence']}",
        f"# {data}: {rows['sentence']}",
        "# `glasstune config --defaults` prints every key; overrides: training.seed=1",
        "model:",
        f"  path: {show_default(model)}",
        *(["  trust_remote_code: true"] if trust else []),
        "  bits: 16                     # 8 or 4 store the base's weights smaller",
        "adapter:",
        "  r: 16",
        "  lora_alpha: 32",
        f"  target_modules: all-linear   # here: {found['targets']}",
        "data:",
        "  sources:",
        f"    - path: {show_default(data)}",
        f"      format: {rows['format']}",
        *_template_lines(rows["format"], found["has_template"], found["family"]),
        f"  max_length: {rows['max_length']:<16} # {rows['lengths']}",
        "  validation_split: 0.02       # held out to measure the loss",
        "training:",
        f"  output_dir: {show_default(_run_name(model, data))}",
        "  num_train_epochs: 3",
        "  train_batch_size: 16         # rows in one update; with packing a row is a full pack",
        "  learning_rate: 2.0e-4",
        "  seed: 0",
    ]
    notes = [f"{c.name}: {c.value} ({c.reason})" for c in choices]
    return InitResult("\n".join(lines) + "\n", notes)


def _model_facts(model: str, trust: bool) -> tuple[Any, dict[str, Any], Choices]:
    from glasstune.data.tokenizer import load_tokenizer
    from glasstune.models.facts import model_facts
    from glasstune.models.resolve import resolve_model

    choices = Choices()
    resolved = resolve_model(model, trust_remote_code=trust, choices=choices)
    tokenizer = load_tokenizer(resolved.folder_or_id, trust_remote_code=trust)
    facts = model_facts(resolved.config)
    config = resolved.config
    parts = []
    for name, words in (("num_hidden_layers", "layers"), ("hidden_size", "hidden")):
        value = getattr(config, name, None)
        if value is not None:
            parts.append(f"{value} {words}")
    parts.append(f"vocabulary {facts.vocabulary_rows:,}")
    if facts.max_positions is not None:
        parts.append(f"{facts.max_positions:,} positions")
    parts.append("documents are packed" if facts.can_pack else f"not packed: {facts.pack_reason}")
    return (
        (facts, tokenizer),
        {
            "family": facts.family,
            "sentence": ", ".join(parts),
            "has_template": bool(tokenizer.chat_template),
            "targets": "every linear layer but the head",
        },
        choices,
    )


def _data_facts(data: str, model: Any) -> dict[str, Any]:
    from glasstune.data.choose import open_source
    from glasstune.data.errors import RowError
    from glasstune.data.formats import to_example
    from glasstune.data.read import RawRow, ReadStats

    facts, tokenizer = model
    source = open_source(SourceConfig(path=data), "data", Path("."))
    lengths = []
    for row in islice(source.rows(ReadStats()), _PEEK):
        if not isinstance(row, RawRow):
            continue
        try:
            example = to_example(row.value, row.origin, source.format, {})
        except (RowError, InputError):
            continue  # `glasstune data` and training name bad rows one by one
        texts = [text for text in example.texts() if text]
        lengths.append(sum(len(ids) for ids in tokenizer(texts)["input_ids"]) if texts else 0)
    longest = max(lengths, default=0)
    # Templates add some tokens a turn: leave room, then round up to a power of two.
    wanted = 64
    while wanted < longest * 1.1 + 32:
        wanted *= 2
    wanted = min(wanted, 2048, facts.max_positions or 2048)
    return {
        "format": source.format,
        "sentence": f"rows of the format {source.format}",
        "max_length": wanted,
        "lengths": f"longest of the first {len(lengths)} rows: about {longest} tokens",
    }


def _template_lines(format: str, has_template: bool, family: str) -> list[str]:
    if has_template or format in ("text", "baichuan2", "prompt_completion"):
        return []
    if family == "baichuan":
        return ["  chat_template: baichuan2     # its published rule: marker ids 195 and 196"]
    name = "alpaca" if format == "alpaca" else "chatml"
    return [f"  chat_template: {name:<14}# the tokenizer has none of its own"]


def _run_name(model: str, data: str) -> str:
    stems = [Path(text.rstrip("/")).stem.strip("*. ") or "x" for text in (model, data)]
    return "runs/" + "-".join(stems).lower().replace(" ", "-")


def _translated(source: Path | str, model: str | None, data: str | None) -> InitResult:
    from glasstune.workflows.translate import translate_text

    found = translate_text(str(source))
    values = found.values
    if model is not None:
        values.setdefault("model", {})["path"] = model
    if data is not None:
        values.setdefault("data", {})["sources"] = [{"path": data}]
    lost = list(found.lost)
    for section, key, word in (("model", "path", "MODEL"), ("data", "sources", "DATA")):
        if key not in values.setdefault(section, {}):
            values[section][key] = word if key == "path" else [{"path": word}]
            lost.append(f"{section}.{key} is not given: replace {word}")
    said = f"{Path(found.name).name} ({found.kind})" if found.name else f"a {found.kind}"
    lines = [f"# Translated from {said}."]
    lines += [_comment("", note) for note in found.notes if not _same_name(note)]
    if lost:
        lines.append("# Without a counterpart, or to be looked at:")
        lines += [_comment("  ", text) for text in lost]
    for section in ("model", "adapter", "data", "losses", "training", "audit"):
        if values.get(section):
            lines += _section(section, values[section])
    text = "\n".join(lines) + "\n"
    return InitResult(text, [*found.notes, *(f"no counterpart: {text}" for text in lost)], lost)


def _comment(indent: str, text: str) -> str:
    """A line of its own, whatever the user's values in the text hold."""
    return f"# {indent}{' '.join(text.split())}"


def _same_name(note: str) -> bool:
    """Whether a note only tells the section of a name that both tools use."""
    name, _, rest = note.partition(" is ")
    return rest.endswith(f".{name} here")


def _section(name: str, values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return [f"{name}: {show_default(values)}"]
    lines = [f"{name}:"]
    for key, value in values.items():
        if key in ("sources", "validation") and isinstance(value, list):
            lines.append(f"  {key}:")
            for item in value:
                lines.append(f"    - {show_default(item)}")
        else:
            lines.append(f"  {key}: {show_default(value)}")
    return lines
