"""A GGUF file, expanded once into a folder that transformers can load at any precision.

transformers refuses to quantise while it reads a GGUF file, and the read is slow, so the file is
expanded to bfloat16 safetensors beside its tokenizer in a cache. The folder's name is the file's
hash and the converter's version; it is written aside and renamed, so it is whole or absent.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from glasstune.core.errors import InputError
from glasstune.core.files import cache_folder, disk_full_named, fsync_tree, sha256_file

CONVERTER_VERSION = 2
"""Raise it whenever the expanded folder's content would change."""

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def expanded_folder(file: Path) -> Path:
    """Returns where a GGUF file's expansion lies, or would lie; reads the file for its hash."""
    return cache_folder() / "gguf" / f"{sha256_file(file)[:32]}-v{CONVERTER_VERSION}"


def expand_gguf(file: Path) -> Path:
    """Returns the folder with a GGUF file's model, expanding it on first use.

    Args:
        file: The GGUF file.

    Returns:
        A folder with `config.json`, bfloat16 safetensors and the tokenizer.

    Raises:
        InputError: `bad_gguf`: the file is not GGUF, or transformers cannot read its kind.
        RunError: `disk_full`.
    """
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise InputError(
                "bad_gguf",
                "the file does not start with the letters GGUF",
                where=str(file),
                fix="download it again, or give a folder with config.json",
            )
    folder = expanded_folder(file)
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # bfloat16 takes at most four times a 4-bit file.
        with disk_full_named(folder, needed=4 * file.stat().st_size):
            _convert(file, aside)
            fsync_tree(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from glasstune.models.quiet import quiet_transformers

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            _complete(tokenizer, file)
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.bfloat16
            )
    except Exception as error:  # a damaged file ends in whatever the reader trips over
        says = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            "bad_gguf",
            f"transformers cannot read this GGUF file: {says}",
            where=str(file),
            fix="download it again, or give the original checkpoint (hub id or folder) instead",
        ) from error
    # The reader leaves a quantisation entry in the config, which the expanded weights are not.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    folder.chmod(0o755)


def _complete(tokenizer: Any, file: Path) -> None:
    """Gives a tokenizer the chat template and special tokens that transformers left in the file.

    transformers 5.24 takes them over for some kinds of tokenizer and for others not.
    """
    from gguf import GGUFReader

    fields = GGUFReader(str(file)).fields

    def read(key: str) -> Any:
        field = fields.get(key)
        return None if field is None else field.contents()

    template = read("tokenizer.chat_template")
    if template and not tokenizer.chat_template:
        tokenizer.chat_template = template
    for name, key in _SPECIAL.items():
        index = read(f"tokenizer.ggml.{key}_token_id")
        if index is not None and getattr(tokenizer, name) is None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(index)))
