"""What is inspected: a config file, a folder, a hub id, a GGUF file or a live module.

Only configs and headers are read here: no weight, no expansion of a GGUF file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.inspection import SourceKind
from glasstune.models.hub import hub_errors_explained
from glasstune.models.inspect.config_check import check_sizes, first_line
from glasstune.models.quiet import quiet_transformers
from glasstune.models.resolve import (
    check_architecture,
    looks_like_path,
    missing_path,
    no_config,
    read_config,
)

_CONFIG_LIMIT = 64 * 2**20
_GGUF = b"GGUF"
_BOM = b"\xef\xbb\xbf"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class ModelSource:
    """A model that can be laid out without its weights.

    Args:
        name: As the user named it; a live module's class.
        kind: Where it comes from.
        config: Its config; None for a module without one.
        module: The live module, never changed; None for everything else.
        weights: Local folder with safetensors, None where there is none.
        trust_remote_code: Whether code of the checkpoint may run.
        findings: What holds at every precision.
    """

    name: str
    kind: SourceKind
    config: PreTrainedConfig | None
    module: nn.Module | None
    weights: Path | None
    trust_remote_code: bool = False
    findings: list[Finding] = field(default_factory=list)


def open_source(
    target: str | Path | nn.Module | PreTrainedConfig, *, trust_remote_code: bool = False
) -> ModelSource:
    """Finds what is to be inspected and reads its config.

    Args:
        target: A config file (any name), a folder, a hub id, a GGUF file, a config object, or a
            module (any `nn.Module`, quantised or with adapters too).
        trust_remote_code: Whether Python code that comes with the checkpoint may run.

    Raises:
        InputError: The path does not exist, is no config, is an adapter or a tokenizer, names no
            known architecture, needs code that is not trusted, holds impossible sizes, or the
            hub refuses or cannot be reached.
    """
    if isinstance(target, nn.Module):
        return _from_module(target, trust_remote_code)
    if isinstance(target, PreTrainedConfig):
        config = copy.deepcopy(target)
        check_sizes(config, config.to_dict(), where=f"{config.model_type} config")
        return _source(str(config.model_type), "config", config, None, trust_remote_code)
    name = str(target)
    local = Path(name).expanduser()
    if local.is_dir():
        file = local / "config.json"
        if not file.is_file():
            raise no_config(local)
        config = _parse(file, local, trust_remote_code)
        return _source(name, "folder", config, _weights(local), trust_remote_code)
    if local.is_file():
        return _from_file(name, local, trust_remote_code)
    if looks_like_path(name):
        raise missing_path(name, local)
    with hub_errors_explained(name):
        file = Path(hf_hub_download(name, "config.json"))
        config = _parse(file, name, trust_remote_code)
    return _source(name, "hub", config, None, trust_remote_code)


def own_quantization(config: Any) -> dict[str, Any] | None:
    """Returns the `quantization_config` that a checkpoint carries, as a plain dict, or None."""
    own = getattr(config, "quantization_config", None)
    if not own:
        return None
    return dict(own) if isinstance(own, Mapping) else dict(own.to_dict())


def quantization_method(own: Mapping[str, Any]) -> str:
    """Returns the method's name: `bitsandbytes`, `gptq`, `awq`, `fp8`, ..."""
    method = own.get("quant_method")
    if method is None:
        bnb = own.get("load_in_4bit") or own.get("load_in_8bit")
        return "bitsandbytes" if bnb else "unknown"
    return str(getattr(method, "value", method))


def _from_module(module: nn.Module, trust: bool) -> ModelSource:
    config = getattr(module, "config", None)
    if not isinstance(config, PreTrainedConfig):
        config = None
    return _source(type(module).__name__, "module", config, None, trust, module)


def _from_file(name: str, file: Path, trust: bool) -> ModelSource:
    if _start(file).startswith(_GGUF):
        return _source(name, "gguf", _gguf_config(file), None, trust)
    # Code that comes with a checkpoint is looked for in its folder.
    place = file.parent if file.name == "config.json" else file
    config = _parse(file, place, trust)
    weights = _weights(file.parent) if file.name == "config.json" else None
    return _source(name, "config", config, weights, trust)


def _start(file: Path) -> bytes:
    """Reads a file's first bytes.

    Raises:
        InputError: `not_readable`.
    """
    try:
        with file.open("rb") as handle:
            return handle.read(256)
    except OSError as error:
        raise InputError(
            "not_readable", str(error.strerror), where=str(file), fix="check the file's permissions"
        ) from error


def _check_is_config(file: Path) -> None:
    """Refuses what is visibly no config before it is read whole."""
    suffix = file.suffix.lower()
    text = _start(file).removeprefix(_BOM).lstrip()
    size = file.stat().st_size
    fix = "give a config.json, its folder, a hub id or a GGUF file"
    if text and _start(file).startswith(_BOM):
        says = "the file starts with a byte order mark, which transformers does not read"
        fix = "save it as UTF-8 without one"
    elif suffix in _WEIGHT_FILES:
        says = f"{file.name} holds weights, not a config"
        fix = f"give the folder ({file.parent}) or its config.json"
    elif suffix == ".gguf":
        raise InputError(
            "bad_gguf",
            "the file does not start with the letters GGUF",
            where=str(file),
            fix="download it again, or give a folder with config.json",
        )
    elif not text:
        says = "the file is empty"
    elif text.startswith(b"["):
        says = "the file holds a JSON list, not a config object"
    elif not text.startswith(b"{"):
        says = "the file is not JSON"
    elif size > _CONFIG_LIMIT:
        says = f"{size:,} bytes are too many for a config"
    else:
        return
    raise InputError("bad_model_config", says, where=str(file), fix=fix)


def _parse(file: Path, place: Path | str, trust: bool) -> PreTrainedConfig:
    """Reads a config file.

    Args:
        file: The file itself, for messages and checks.
        place: What transformers reads the class from: file, folder or hub id.
        trust: Whether code of the checkpoint may run.
    """
    _check_is_config(file)
    content = read_config(file)
    _check_other_json(content, file)
    check_architecture(content, str(file), trust)
    if content.get("auto_map") and trust and place == file:
        raise InputError(
            "remote_code_needed",
            "the code that this config names is looked for beside a file called config.json",
            where=str(file),
            fix="give the checkpoint's folder",
        )
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(place), trust_remote_code=trust)
    except Exception as error:  # whatever a class trips over, it read the user's values
        raise InputError(
            "bad_model_config",
            f"transformers cannot read this config: {first_line(error)}",
            where=str(file),
            fix="repair the value that the message names",
        ) from error
    check_sizes(config, content, where=str(file))
    parsed: PreTrainedConfig = config
    return parsed


def _check_other_json(content: Mapping[str, Any], file: Path) -> None:
    """Names the JSON files that lie beside a config and are taken for it."""
    if "model_type" in content:
        return
    fix = "give the model's config.json"
    if "peft_type" in content:
        base = content.get("base_model_name_or_path")
        says = f"this is a PEFT adapter's config{f' (base: {base})' if base else ''}"
        fix = "give the adapter's folder, or its base model"
        raise InputError("adapter_not_model", says, where=str(file), fix=fix)
    if isinstance(content.get("model"), dict) and "added_tokens" in content:
        says = "this is a tokenizer's file, not a model's config"
    elif "tokenizer_class" in content and "architectures" not in content:
        says = "this is a tokenizer's config, not a model's"
    elif "weight_map" in content:
        says = "this is an index of weights, not a config"
    elif (
        content
        and file.name != "config.json"
        and not content.keys() & {"architectures", "auto_map"}
    ):
        beside = file.parent / "config.json"
        says = f"{file.name} is no model's config: it has neither model_type nor architectures"
        fix = f"give {beside}" if beside.is_file() else fix
        if (file.parent / "run.json").is_file():
            fix = f"give the run's folder ({file.parent})"
    else:
        return
    raise InputError("bad_model_config", says, where=str(file), fix=fix)


def _gguf_config(file: Path) -> PreTrainedConfig:
    """Reads a GGUF file's header; the tensors stay on the disk."""
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # a damaged file ends in whatever the reader trips over
        raise InputError(
            "bad_gguf",
            f"transformers cannot read this GGUF file: {first_line(error)}",
            where=str(file),
            fix="download it again, or give the original checkpoint (hub id or folder) instead",
        ) from error
    # What is loaded is expanded to 16 bit first, see models.gguf.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    check_sizes(config, {}, where=str(file))
    parsed: PreTrainedConfig = config
    return parsed


def _weights(folder: Path) -> Path | None:
    return folder if any(folder.glob("*.safetensors")) else None


def stored_bytes(folder: Path) -> int:
    """Returns the bytes of all tensors in a folder's safetensors files, from their headers.

    Raises:
        InputError: `bad_weights`: a header is damaged.
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > 2**27 or length > file.stat().st_size:
                raise _bad_header(file)
            try:
                header = json.loads(handle.read(length))
                spans = [entry["data_offsets"] for key, entry in header.items() if key[:2] != "__"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _bad_header(file) from error
        total += sum(int(end) - int(start) for start, end in spans)
    return total


def _bad_header(file: Path) -> InputError:
    return InputError(
        "bad_weights",
        "the header of this safetensors file is damaged",
        where=str(file),
        fix="download it again",
    )


def _source(
    name: str,
    kind: SourceKind,
    config: PreTrainedConfig | None,
    weights: Path | None,
    trust: bool,
    module: nn.Module | None = None,
) -> ModelSource:
    # Findings look at the finished source.
    from glasstune.models.inspect.findings import source_findings

    source = ModelSource(name, kind, config, module, weights, trust)
    source.findings.extend(source_findings(source))
    return source
