"""From `model.path` to a config, without weights: hub id, folder or GGUF file."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from glasstune.core.choices import Choices
from glasstune.core.errors import InputError
from glasstune.models.families.native import note_native, register_native
from glasstune.models.fingerprint import model_fingerprint
from glasstune.models.gguf import expand_gguf
from glasstune.models.hub import hub_errors_explained

Kind = Literal["hub", "folder", "gguf"]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A base model that was found, its weights not yet read.

    Args:
        path: As the user wrote it.
        folder_or_id: Folder or hub id that `from_pretrained` takes, also for the tokenizer.
        config: Its config.
        fingerprint: Its identity, see `models.fingerprint`.
        kind: Where it came from.
        trust_remote_code: Whether code of the checkpoint may run.
    """

    path: str
    folder_or_id: str
    config: PreTrainedConfig
    fingerprint: str
    kind: Kind
    trust_remote_code: bool = False


def resolve_model(
    path: str, *, trust_remote_code: bool = False, choices: Choices | None = None
) -> ResolvedModel:
    """Finds a base model and reads its config.

    Args:
        path: Hub id, folder, or GGUF file.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
        choices: Where the expansion of a GGUF file is noted, and what a family of our own reads
            out of a config.

    Raises:
        InputError: The path does not exist, is no model, is an adapter, needs code that is not
            trusted, or the hub refuses or cannot be reached.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.name == "config.json":
            return resolve_model(
                str(local.parent), trust_remote_code=trust_remote_code, choices=choices
            )
        folder = expand_gguf(local)
        if choices is not None:
            choices.record(
                "model.expanded", str(folder), "a GGUF file is expanded to bfloat16 once and cached"
            )
        return _from_folder(path, folder, "gguf", trust_remote_code)
    if local.is_dir():
        resolved = _from_folder(path, local, "folder", trust_remote_code)
    elif looks_like_path(path):
        raise missing_path(path, local)
    else:
        resolved = _from_hub(path, trust_remote_code)
    if choices is not None:
        note_native(resolved.config, choices)
    return resolved


def _from_folder(path: str, folder: Path, kind: Kind, trust: bool) -> ResolvedModel:
    file = folder / "config.json"
    if not file.is_file():
        raise no_config(folder)
    content = read_config(file)
    check_architecture(content, f"model.path={path}", trust)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust)
    fingerprint = model_fingerprint(content, folder, None)
    return ResolvedModel(path, str(folder), config, fingerprint, kind, trust)


def _from_hub(path: str, trust: bool) -> ResolvedModel:
    with hub_errors_explained(path):
        file = Path(hf_hub_download(path, "config.json"))
        content = read_config(file)
        check_architecture(content, f"model.path={path}", trust)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    # The cache keeps a file of commit C below snapshots/C.
    commit = file.parent.name
    fingerprint = model_fingerprint(content, None, commit)
    return ResolvedModel(path, path, config, fingerprint, "hub", trust)


def read_config(file: Path) -> dict[str, Any]:
    """Reads a `config.json`.

    Raises:
        InputError: `bad_model_config`: not JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            "bad_model_config", f"not valid JSON: {error}", where=str(file), fix="repair the file"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            "bad_model_config", "not a JSON object", where=str(file), fix="repair the file"
        )
    return content


def check_architecture(content: dict[str, Any], where: str, trust: bool) -> None:
    """Refuses a checkpoint whose class transformers does not have, before it asks on a terminal.

    Args:
        content: Of its `config.json`.
        where: For the message.
        trust: Whether Python code that comes with the checkpoint may run.

    Raises:
        InputError: `remote_code_needed`, or `unknown_architecture`.
    """
    kind = content.get("model_type")
    if register_native(kind) or (isinstance(kind, str) and kind in CONFIG_MAPPING):
        return
    if content.get("auto_map"):
        if trust:
            return
        raise InputError(
            "remote_code_needed",
            f"the architecture {kind!r} runs Python code that comes with the checkpoint",
            where=where,
            fix="read that code, then set model.trust_remote_code=true",
        )
    if kind is None:
        named = content.get("architectures")
        said = f"; it names the class {named[0]}" if isinstance(named, list) and named else ""
        raise InputError(
            "unknown_architecture",
            f"config.json has no model_type, so it names no architecture{said}",
            where=where,
            fix='add the architecture\'s name, for example "model_type": "llama"',
        )
    near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=1)
    hint = f"; nearest known: {near[0]}" if near else ""
    raise InputError(
        "unknown_architecture",
        f"config.json has model_type {kind!r}, which this transformers does not know{hint}",
        where=where,
        fix="use a checkpoint of a supported architecture, or a transformers that has it",
    )


def looks_like_path(path: str) -> bool:
    """Whether a text is meant as a path, not as a hub id."""
    return (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or "\\" in path
        or path.lower().endswith((".gguf", ".json", ".safetensors", ".bin"))
    )


def missing_path(path: str, local: Path) -> InputError:
    """Returns the error for a path that does not exist, with the nearest name beside it."""
    if local.exists():
        return InputError(
            "model_not_found", f"{path} is neither a file nor a folder", where="model.path",
            fix="give a file on the disk, a folder or a hub id",
        )  # fmt: skip
    if "://" in path:
        hub_id = "/".join(path.partition("://")[2].split("/")[1:3])
        return InputError(
            "model_not_found", f"{path} is an address, not a path or a hub id", where="model.path",
            fix=f"give the hub id: {hub_id}" if hub_id else "give a hub id, such as owner/name",
        )  # fmt: skip
    parent = local.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(local.name, names, n=1)
    fix = f"did you mean {parent / near[0]}?" if near else "check the path"
    return InputError("model_not_found", f"{path} does not exist", where="model.path", fix=fix)


def no_config(folder: Path) -> InputError:
    """Returns the error for a folder without `config.json`, by what it holds instead."""
    if (folder / "adapter_config.json").is_file():
        return InputError(
            "adapter_not_model",
            "this folder holds a PEFT adapter, not a base model",
            where=str(folder),
            fix="give the base as model.path and this folder as adapter.path",
        )
    if (folder / "run.json").is_file():
        return InputError(
            "run_not_model",
            "this folder holds a run, not a base model",
            where=str(folder),
            fix="give the run's base as model.path; adapter.path: "
            f"{folder / 'adapter'} goes on from its adapter",
        )
    ggufs = sorted(entry.name for entry in folder.glob("*.gguf"))
    if ggufs:
        fix = f"give the GGUF file itself, for example {folder / ggufs[0]}"
    else:
        fix = "give a folder that save_pretrained wrote (config.json, weights, tokenizer)"
    return InputError("not_a_model", "the folder has no config.json", where=str(folder), fix=fix)
