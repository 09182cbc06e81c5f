"""Writes a folder's model as GGUF files for llama.cpp and Ollama, a piece of a tensor at a time.

Types follow llama.cpp's own: matrices in float16 or Q8_0, everything of one dimension in float32.
Q8_0 holds 32 values of a row as a float16 scale and 32 signed bytes: scale = max |x| / 127.

Shape letters: R rows, C columns, H heads, d width of a head.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from glasstune.core.errors import InputError
from glasstune.core.files import disk_full_named, fsync_path
from glasstune.core.protocols import Progress
from glasstune.core.tensors import read_rows
from glasstune.export.gguf_model import (
    PlannedTensor,
    add_hyperparameters,
    architecture,
    head_size,
    plan_tensors,
    rope_factors,
)
from glasstune.export.gguf_vocab import Vocabulary, add_vocabulary, gguf_vocabulary
from glasstune.export.modelfile import write_modelfile
from glasstune.generation.tokenizer_facts import tokenizer_facts
from glasstune.models.resolve import resolve_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = {"f16": Type.F16, "q8_0": Type.Q8_0}
"""Names of `--gguf` to the type of a matrix."""

_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
_PIECE = 32 * 1024 * 1024
"""Values read at a time: 128 MiB in float32."""
_BLOCK = 32
_HALF_WRITTEN = re.compile(r"^\.(.+)\.[^.]+$")


def write_gguf(
    folder: Path,
    kinds: Sequence[str],
    progress: Progress | None = None,
    *,
    name: str | None = None,
) -> list[Path]:
    """Writes GGUF files and an Ollama Modelfile into the folder of a model.

    Args:
        folder: A finished model: config, safetensors, tokenizer. Nothing of it is changed.
        kinds: Of `KINDS`; each gives `model-KIND.gguf`.
        progress: Shows bytes read, and says what readers will do otherwise than transformers.
        name: The model's name in the file; the folder's by default, `out` for `.out.merge-x1`,
            as a folder is named that is still being written.

    Returns:
        The GGUF files, in the order of `kinds`. Each is whole or absent.

    Raises:
        InputError: A kind, the family, a setting or the tokenizer has no GGUF form; nothing is
            written.
        RunError: `disk_full`.
    """
    check_kinds(kinds)
    config = resolve_model(str(folder)).config
    arch = architecture(config, str(folder))
    plan = plan_tensors(folder, config, arch)
    facts = tokenizer_facts(folder)
    vocabulary = gguf_vocabulary(facts, int(config.vocab_size))
    name = name or _HALF_WRITTEN.sub(r"\1", folder.name)
    notes: list[str] = list(vocabulary.notes)
    written: list[Path] = []
    for kind in dict.fromkeys(kinds):
        path = folder / f"model-{kind}.gguf"
        found = _write_one(path, kind, config, arch, plan, vocabulary, name, progress)
        notes += [note for note in found if note not in notes]
        written.append(path)
    notes += write_modelfile(folder, written[0].name, facts)
    if progress is not None:
        for note in notes:
            progress.say(f"note: {note}")
    return written


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuses a kind that is not written.

    Raises:
        InputError: `bad_gguf_kind`.
    """
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong or not kinds:
        raise InputError(
            "bad_gguf_kind",
            f"{wrong[0]!r} is no kind of GGUF that is written here" if wrong else "no kind given",
            where="--gguf",
            fix="use f16, q8_0 or both; llama-quantize makes smaller ones from the f16 file",
        )


def _write_one(
    path: Path,
    kind: str,
    config: Any,
    arch: gguf.MODEL_ARCH,
    plan: Sequence[PlannedTensor],
    vocabulary: Vocabulary,
    name: str,
    progress: Progress | None,
) -> list[str]:
    """Writes one file aside and renames it; returns notes on its hyperparameters."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = GGUFWriter(aside, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.MODEL)
    # A file named exactly `mistral` makes transformers look for an architecture of this name.
    writer.add_name("Mistral" if name == "mistral" else name)
    writer.add_file_type(int(_FILE_TYPES[kind]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = add_hyperparameters(writer, config)
    add_vocabulary(writer, vocabulary)
    types = [_type_of(tensor, KINDS[kind]) for tensor in plan]
    sizes = [_bytes_of(tensor, type) for tensor, type in zip(plan, types, strict=True)]
    factors = rope_factors(config)
    if factors is not None:
        table = np.array(factors, dtype=np.float32)
        writer.add_tensor_info("rope_freqs.weight", table.shape, table.dtype, table.nbytes)
    for tensor, type, size in zip(plan, types, sizes, strict=True):
        writer.add_tensor_info(
            tensor.name, tensor.stored.shape, np.dtype(np.float32), size, raw_dtype=type
        )
    with disk_full_named(path, needed=sum(sizes)), _bar(progress, path, plan) as advance:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            out = writer.fout[0]
            writer.write_padding(out, out.tell())
            if factors is not None:
                out.write(table.tobytes())
                writer.write_padding(out, table.nbytes)
            for tensor, type, size in zip(plan, types, sizes, strict=True):
                for piece, read in _pieces(tensor, type, head_size(config)):
                    out.write(piece.data)
                    advance(read)
                writer.write_padding(out, size)
            writer.close()
            fsync_path(aside)
            aside.replace(path)
            fsync_path(path.parent)
        finally:
            for file in writer.fout or ():
                file.close()
            aside.unlink(missing_ok=True)
    return notes


@contextmanager
def _bar(progress: Progress | None, path: Path, plan: Sequence[PlannedTensor]) -> Iterator[Any]:
    task = f"write {path.name}"
    if progress is None:
        yield lambda amount: None
        return
    total = sum(tensor.stored.size for tensor in plan) >> 20
    done = left = 0

    def advance(amount: int) -> None:
        nonlocal done, left
        left += amount
        whole = left >> 20
        if whole:
            left -= whole << 20
            done += whole
            progress.advance(task, whole)

    progress.start(task, total, "MiB")
    try:
        yield advance
    finally:
        progress.finish(task)


def _type_of(tensor: PlannedTensor, matrix: Type) -> Type:
    if len(tensor.stored.shape) == 1:
        return Type.F32
    if matrix is Type.Q8_0 and tensor.stored.shape[-1] % _BLOCK:
        return Type.F16  # Q8_0 has no part of a block
    return matrix


def _bytes_of(tensor: PlannedTensor, type: Type) -> int:
    values = int(np.prod(tensor.stored.shape))
    block, size = gguf.GGML_QUANT_SIZES[type]
    return int(values // block * size)


def _pieces(tensor: PlannedTensor, type: Type, head: int) -> Iterator[tuple[NDArray[Any], int]]:
    """Yields a tensor's bytes in order, with the bytes that were read for them.

    Raises:
        InputError: `overflow`: a value does not fit in the type.
    """
    stored = tensor.stored
    rows = stored.shape[0]
    columns = int(np.prod(stored.shape[1:]))
    # Whole heads, so that their rows can change places.
    step = max(1, _PIECE // max(1, columns) // head) * head
    for start in range(0, rows, step):
        values_RC = read_rows(stored, start, start + step).float().numpy()
        read = values_RC.size * (stored.size // max(1, rows * columns))
        if tensor.paired:
            values_RC = pair_rows(values_RC, len(values_RC) // head)
        yield _encode(values_RC, type, tensor.name), read


def pair_rows(values_RC: NDArray[Any], heads: int) -> NDArray[Any]:
    """Brings the two rows of a rotary pair next to each other, head by head.

    transformers turns row i of a head with row i + d/2; llama.cpp turns neighbours.

    Args:
        values_RC: [H*d, C], or [H*d] for a bias.
        heads: H.
    """
    half = values_RC.shape[0] // heads // 2
    order = np.arange(heads * 2 * half).reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)
    return values_RC[order]


def _encode(values: NDArray[Any], type: Type, name: str) -> NDArray[Any]:
    """Returns float32 values in a type of GGUF, contiguous.

    Raises:
        InputError: `overflow`.
    """
    if type is Type.F32:
        return np.ascontiguousarray(values, dtype=np.float32)
    largest = float(np.abs(values).max(initial=0.0))
    limit = 65504.0 if type is Type.F16 else 65504.0 * 127
    if not largest <= limit:
        raise InputError(
            "overflow",
            f"{name} holds {largest:g}, more than {type.name} can",
            where=name,
            fix="use q8_0" if largest <= 65504.0 * 127 else "look for Inf or NaN in the model",
        )
    if type is Type.F16:
        return np.ascontiguousarray(values.astype(np.float16))
    return np.ascontiguousarray(gguf.quantize(np.ascontiguousarray(values), type))
