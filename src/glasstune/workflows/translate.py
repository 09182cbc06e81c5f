"""Translates a LLaMA-Factory or Axolotl YAML, or a training script's command line, to a config.

Names come from the one table in `core/config_names.py`; here is only what reading such files
needs beyond it: command-line words, LLaMA-Factory's `dataset_info.json`, and the adapter that
Baichuan2's `fine-tune.py` builds in its code.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasstune.core.config_build import Source, build
from glasstune.core.config_fields import known_keys
from glasstune.core.config_names import translate
from glasstune.core.errors import InputError
from glasstune.core.yaml_text import YamlDocument, parse_yaml, plain_value


@dataclass(slots=True)
class Translated:
    """What became of a foreign file.

    Args:
        values: Nested mapping of our own keys.
        notes: What was translated, one sentence a name.
        lost: Names without a counterpart, or that ask for what Glasstune does not do.
        kind: What the file was.
    """

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    kind: str = ""


def translate_file(path: Path) -> Translated:
    """Reads and translates a file.

    Raises:
        InputError: It cannot be read, is neither form, or contradicts itself.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            "from_unreadable", f"cannot be read: {reason}", where=str(path), fix="give a text file"
        ) from None
    words = _command_words(text)
    if words is not None:
        given, script = read_options(words)
        result = _translate(given, YamlDocument(given, str(path)))
        result.kind = f"command line of {script}" if script else "command line"
        _fill(result, _TRAINER)
        if script.replace("_", "-") == "fine-tune.py":
            _baichuan2(given, result)
        return result
    document = parse_yaml(text, str(path))
    if not isinstance(document.value, dict):
        raise InputError(
            "from_unknown",
            "neither a YAML file with keys nor a command line with --options",
            where=str(path),
            fix="give a LLaMA-Factory or Axolotl YAML, or a file with a fine-tune.py command",
        )
    given = document.value
    if isinstance(given.get("model"), dict) and isinstance(given.get("data"), dict):
        raise InputError(
            "from_own",
            "this is a configuration of Glasstune already",
            where=str(path),
            fix=f"glasstune train {path}",
        )
    axolotl = {"base_model", "datasets", "micro_batch_size", "sequence_len"} & set(given)
    kind = "Axolotl YAML" if axolotl else "LLaMA-Factory YAML"
    lost: list[str] = []
    if not axolotl:
        given = _named_data_sets(given, path, lost)
    result = _translate(given, document)
    result.kind = kind
    result.lost[:0] = lost
    if axolotl:
        _fill(result, {"data.packing": False})
    else:
        rank = result.values.get("adapter", {}).get("r", 8)
        _fill(result, {**_TRAINER, **_FACTORY, "adapter.lora_alpha": 2 * rank})
    return result


_TRAINER = {
    "training.learning_rate": 5e-5,
    "training.lr_scheduler_type": "linear",
    "training.warmup_steps": 0,
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 1,
    "data.packing": False,
}
"""What transformers' Trainer does where nothing is said, and differs from our defaults."""

_FACTORY = {"adapter.r": 8, "data.max_length": 2048, "data.truncation": "cut"}


def _fill(result: Translated, defaults: dict[str, Any]) -> None:
    """Writes the other tool's defaults, so that the same updates are computed."""
    filled = []
    for key, value in defaults.items():
        section, name = key.split(".")
        if name not in result.values.setdefault(section, {}):
            result.values[section][name] = value
            filled.append(f"{key}: {str(value).lower() if isinstance(value, bool) else value}")
    if filled:
        result.notes.append(f"not given there, so its defaults: {', '.join(filled)}")


def _command_words(text: str) -> list[str] | None:
    """Splits a shell script's command into words, or returns None where it is none."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\s*(\n|$)", " ", "\n".join(lines))
    if not re.search(r"(^|\s)--\w", joined):
        return None
    command = next(line for line in joined.splitlines() if re.search(r"(^|\s)--\w", line))
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def read_options(words: list[str]) -> tuple[dict[str, Any], str]:
    """Reads `--name value` pairs as HfArgumentParser does.

    Args:
        words: The command's words.

    Returns:
        Names and values (a bare flag is True, several values a list), and the script's name.
    """
    scripts = [word for word in words if word.endswith(".py")]
    script = Path(scripts[0]).name if scripts else ""
    # Options before the script belong to the launcher (deepspeed, torchrun).
    rest = words[words.index(scripts[0]) + 1 :] if scripts else words
    found: dict[str, Any] = {}
    name = ""
    for word in rest:
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = _word(value) if sign else True
        elif name:
            value = _word(word)
            if found[name] is True:
                found[name] = value
            else:
                before = found[name]
                found[name] = [*before, value] if isinstance(before, list) else [before, value]
    return found, script


def _word(text: str) -> Any:
    return {"True": True, "False": False, "None": None}.get(text, plain_value(text))


def _translate(given: dict[str, Any], document: YamlDocument) -> Translated:
    result = Translated()
    own = {
        key.removeprefix("training."): key
        for key in known_keys()
        if key.startswith("training.") and key.count(".") == 1
    }
    kept: dict[str, Any] = {}
    for name, value in given.items():
        try:
            meaning = translate("", name, value, own)
        except InputError as error:
            result.lost.append(error.message)
            continue
        if meaning is None and not (isinstance(value, dict) and name in known_keys()):
            if value is not None:
                result.lost.append(f"{name}: {value} is not known here")
            continue
        kept[name] = value
    built = build(Source(kept, document), [])
    for note in dict.fromkeys(built.notes):
        (result.lost if "no counterpart" in note else result.notes).append(note)
    result.values = built.value
    return result


def _baichuan2(given: dict[str, Any], result: Translated) -> None:
    """Adds what Baichuan2's `fine-tune.py` holds in its code and not in its options."""
    for source in result.values.get("data", {}).get("sources", []):
        source["format"] = "baichuan2"
    result.values.setdefault("model", {})["trust_remote_code"] = True
    result.notes.append(
        "fine-tune.py: rows are read by its rule (format: baichuan2) and the model's own code runs"
    )
    if given.get("use_lora") is True:
        result.values["adapter"] = {
            "r": 1,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "target_modules": ["W_pack"],
        }
        result.notes.append("fine-tune.py: its LoRA is r=1, alpha=32, dropout=0.1 on W_pack")
    else:
        result.lost.append(
            "fine-tune.py without --use_lora True trains all weights; here LoRA is trained"
        )


def _named_data_sets(given: dict[str, Any], path: Path, lost: list[str]) -> dict[str, Any]:
    """Replaces names of LLaMA-Factory's `dataset_info.json` by the files that it lists."""
    if not isinstance(given.get("dataset"), (str, list)):
        return given
    folder = Path(str(given.get("dataset_dir") or "data"))
    places = [folder, path.parent / folder, path.parent]
    info_file = next(
        (p / "dataset_info.json" for p in places if (p / "dataset_info.json").is_file()), None
    )
    names = given["dataset"]
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    if info_file is None:
        if not all(Path(str(name)).exists() for name in names):
            lost.append(
                f"dataset: {', '.join(map(str, names))} is looked up in dataset_info.json, which "
                "is not here: write the files' paths into data.sources"
            )
        return given
    try:
        info = json.loads(info_file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError("from_unreadable", f"is no JSON: {error}", where=str(info_file)) from None
    sources = [_listed(str(name), info, info_file, lost) for name in names]
    rest = {name: value for name, value in given.items() if name != "dataset"}
    return {**rest, "data": {"sources": sources}}


_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _listed(name: str, info: Any, info_file: Path, lost: list[str]) -> dict[str, Any]:
    entry = info.get(name) if isinstance(info, dict) else None
    if not isinstance(entry, dict):
        lost.append(f"dataset: {name} is not in {info_file}: taken as a path")
        return {"path": name}
    source: dict[str, Any] = {"path": name, "name": name}
    if entry.get("file_name"):
        source["path"] = str(info_file.parent / str(entry["file_name"]))
    elif entry.get("hf_hub_url"):
        source["path"] = str(entry["hf_hub_url"])
    columns = _mapping(entry.get("columns"))
    if entry.get("ranking"):
        lost.append(f"dataset: {name} holds preferences, which Glasstune does not train on")
    if entry.get("formatting") == "sharegpt":
        tags = _mapping(entry.get("tags"))
        kind = "messages" if tags.get("role_tag") == "role" else "conversations"
        source["format"] = kind
        column = columns.get("messages")
        if column and column != kind:
            source["columns"] = {kind: column}
        return source
    mapped = {_ALPACA[key]: value for key, value in columns.items() if key in _ALPACA}
    if set(columns) == {"prompt"}:
        return {**source, "format": "text", "columns": {"text": columns["prompt"]}}
    if any(ours != theirs for ours, theirs in mapped.items()):
        source["columns"] = mapped
    return {**source, "format": "alpaca"}
