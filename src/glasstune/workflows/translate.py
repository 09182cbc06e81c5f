"""Translates a LLaMA-Factory or Axolotl YAML, or a training script's command line, to a config.

Names come from the one table in `core/config_names.py`, values of `Trainer`'s options from
`translate_trainer.py`; here is only what reading such files needs beyond them: LLaMA-Factory's
`dataset_info.json`, and what Baichuan2's `fine-tune.py` holds in its code.
"""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any

from glasstune.core.config_build import Source, build
from glasstune.core.config_fields import known_keys
from glasstune.core.config_names import FLAT, FOREIGN, translate
from glasstune.core.errors import InputError
from glasstune.core.yaml_text import YamlDocument, parse_yaml
from glasstune.workflows.translate_command import Command, is_file, looks_like_command, read_command
from glasstune.workflows.translate_deepspeed import apply_deepspeed
from glasstune.workflows.translate_launch import apply_launcher, rows_of_update
from glasstune.workflows.translate_trainer import OPTIONS, TRAINER, Translated, fill, settle


def translate_text(text: str) -> Translated:
    """Translates what `--from` names: a file, `-` for standard input, or a command line itself.

    Raises:
        InputError: As `translate_file`.
    """
    if text == "-":
        return translate_read(sys.stdin.read(), "standard input", Path("."))
    if looks_like_command(text) and not is_file(Path(text)):
        return translate_read(text, "--from", Path("."))
    return translate_file(Path(text))


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
    result = translate_read(text, str(path), path.parent)
    result.name = str(path)
    return result


def translate_read(text: str, name: str, folder: Path) -> Translated:
    """Translates a text of either form.

    Args:
        text: A YAML file's or a shell script's content, or a command line.
        name: For messages.
        folder: Where files that it names are looked for, beside the current folder.

    Raises:
        InputError: It is neither form, or contradicts itself.
    """
    command = read_command(text, name)
    if command is not None:
        return _translate_command(command, name, folder)
    document = parse_yaml(text, name)
    if not isinstance(document.value, dict):
        raise InputError(
            "from_unknown",
            "neither a YAML file with keys nor a command line with --options",
            where=name,
            fix="give a LLaMA-Factory or Axolotl YAML, or a fine-tune.py command (or its file)",
        )
    given = dict(document.value)
    if isinstance(given.get("model"), dict) and isinstance(given.get("data"), dict):
        raise InputError(
            "from_own",
            "this is a configuration of Glasstune already",
            where=name,
            fix=f"glasstune train {name}",
        )
    axolotl = {"base_model", "datasets", "micro_batch_size", "sequence_len"} & set(given)
    result = Translated(kind="Axolotl YAML" if axolotl else "LLaMA-Factory YAML")
    if not axolotl:
        given = _named_data_sets(given, folder, result.lost)
    if given.get("deepspeed"):
        apply_deepspeed(given, given.pop("deepspeed"), (Path("."), folder), result)
    _translate(settle(given, result), document, result)
    if axolotl:
        fill(result, {"data.packing": False})
    else:
        rank = result.values.get("adapter", {}).get("r", 8)
        fill(result, {**TRAINER, **_FACTORY, "adapter.lora_alpha": 2 * rank})
    return result


def _translate_command(command: Command, name: str, folder: Path) -> Translated:
    result = Translated(notes=command.notes, lost=command.lost)
    given = _full_names(command.options, result)
    result.kind = f"command line of {command.script}" if command.script else "command line"
    baichuan = command.script.replace("_", "-") == "fine-tune.py"
    if baichuan and given.get("use_lora") is not True:
        raise _full_fine_tuning(name)
    number = apply_launcher(command, given, result)
    asked = given.pop("deepspeed", None)
    if asked is not None:
        apply_deepspeed(given, asked, (Path("."), folder), result)
    _translate(settle(given, result), YamlDocument(given, name), result)
    if baichuan:
        _baichuan2(given, result)
    held_out = bool(result.values.get("data", {}).get("validation"))
    fill(result, TRAINER | ({} if held_out else {"data.validation_split": 0.0}))
    rows_of_update(result, number, given)
    return result


_FACTORY = {"adapter.r": 8, "data.max_length": 2048, "data.truncation": "cut"}


def _full_names(options: dict[str, Any], result: Translated) -> dict[str, Any]:
    """Completes shortened names as argparse does: where exactly one option starts so."""
    names = {*FOREIGN, *FLAT, *OPTIONS, *_own_names()}
    found = {}
    for name, value in options.items():
        longer = [known for known in names if known.startswith(name)]
        if name not in names and len(longer) == 1:
            result.notes.append(f"--{name} is short for --{longer[0]}")
            name = longer[0]
        found[name] = value
    return found


def _own_names() -> dict[str, str]:
    return {
        key.removeprefix("training."): key
        for key in known_keys()
        if key.startswith("training.") and key.count(".") == 1
    }


def _translate(given: dict[str, Any], document: YamlDocument, result: Translated) -> None:
    own = _own_names()
    kept: dict[str, Any] = {}
    for name, value in given.items():
        try:
            meaning = translate("", name, value, own)
        except InputError as error:
            result.lost.append(error.message)
            continue
        if meaning is None and not (isinstance(value, dict) and name in known_keys()):
            if value is not None:
                near = difflib.get_close_matches(name, [*FOREIGN, *FLAT, *OPTIONS, *own], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                result.lost.append(f"{name}: {value} is not known here{hint}")
            continue
        kept[name] = value
    built = build(Source(kept, document), [])
    for note in dict.fromkeys(built.notes):
        (result.lost if "no counterpart" in note else result.notes).append(note)
    result.values = built.value


def _full_fine_tuning(name: str) -> InputError:
    """Refused and not translated: a config would train something else than the command does."""
    return InputError(
        "full_fine_tuning",
        "fine-tune.py without --use_lora True trains all weights of the model; Glasstune trains "
        "LoRA adapters and has no counterpart of that",
        where=name,
        fix="add --use_lora True for that script's LoRA (r=1 on W_pack; a larger adapter.r learns "
        "more), or train all weights with another tool",
    )


_SCRIPT = {
    "model.path": "baichuan-inc/Baichuan2-7B-Base",
    "model.dtype": "float32",
    "adapter.r": 1,
    "adapter.lora_alpha": 32,
    "adapter.lora_dropout": 0.1,
    "adapter.target_modules": ["W_pack"],
    "data.max_length": 512,
    "data.truncation": "cut",
    "training.save_total_limit": None,
}
"""What Baichuan2's `fine-tune.py` holds in its code or takes by default."""


def _baichuan2(given: dict[str, Any], result: Translated) -> None:
    for source in result.values.get("data", {}).get("sources", []):
        source["format"] = "baichuan2"
    result.notes.append(
        "fine-tune.py: rows are read by its rule (format: baichuan2), cut at the longest length; "
        "the checkpoint's own code is not run, Glasstune has this family itself"
    )
    if given.get("bf16") is True:
        result.notes.append(
            "bf16: the frozen weights are stored in bfloat16, the adapter stays float32"
        )
    fill(result, _SCRIPT, "fine-tune.py's own")


def _named_data_sets(given: dict[str, Any], beside: Path, lost: list[str]) -> dict[str, Any]:
    """Replaces names of LLaMA-Factory's `dataset_info.json` by the files that it lists."""
    if not isinstance(given.get("dataset"), (str, list)):
        return given
    folder = Path(str(given.get("dataset_dir") or "data"))
    places = [folder, beside / folder, beside]
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
