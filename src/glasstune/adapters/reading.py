"""Reading an adapter file, whatever wrapped the model that wrote it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from glasstune.core.errors import InputError
from glasstune.core.tensors import load_tensors

WEIGHTS = "adapter_model.safetensors"
_LEGACY_WEIGHTS = "adapter_model.bin"
# Names that torch.compile, DDP, FSDP and multimodal wrappers put into a path.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "language_model")


def read_adapter_file(folder: Path) -> dict[str, Tensor]:
    """Reads an adapter's tensors, never running code from the file.

    Raises:
        InputError: `no_adapter` or `bad_adapter`.
    """
    for name in (WEIGHTS, _LEGACY_WEIGHTS):
        path = folder / name
        if path.is_file():
            break
    else:
        raise InputError(
            "no_adapter",
            f"the folder has no {WEIGHTS}",
            where=str(folder),
            fix="give a folder that holds a PEFT adapter",
        )
    try:
        if path.suffix == ".safetensors":
            tensors = load_tensors(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own type for a damaged file
        raise InputError(
            "bad_adapter",
            f"the file cannot be read: {error}",
            where=str(path),
            fix="copy the adapter again, or use an earlier checkpoint",
        ) from error
    return tensors


def fit_keys(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Renames tensors to the names that the model expects, stripping known wrappers.

    Args:
        tensors: What the file holds.
        expected: The model's names (`adapter_state`).
        folder: For the message.

    Returns:
        One tensor for each expected name.

    Raises:
        InputError: `adapter_keys`: not every name on either side has its partner, with examples
            of both; or a shape differs.
    """
    by_bare: dict[str, str] = {}
    for name in expected:
        by_bare.setdefault(bare_name(name), name)
    fitted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = name if name in expected else by_bare.get(bare_name(name))
        if match is None or match in fitted:
            unknown.append(name)
        else:
            fitted[match] = tensor
    # PEFT's own file may hold whole embeddings beside LoRA on them; they were not trained.
    unknown = [name for name in unknown if not re.search(r"\.base_layer\.weight$", name)]
    missing = [name for name in expected if name not in fitted]
    if unknown or missing:
        raise InputError(
            "adapter_keys",
            f"{len(unknown)} of {len(tensors)} tensors of the file have no place in the model, "
            f"for example {unknown[:3]}; {len(missing)} of {len(expected)} places of the model "
            f"have no tensor, for example {missing[:3]}",
            where=str(folder),
            fix="give the adapter's own base model as model.path; names must differ from PEFT's "
            f"by nothing but {', '.join(_WRAPPERS)} or a missing base_model.model.",
        )
    for name, tensor in fitted.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                "adapter_shape",
                f"{name} is {tuple(tensor.shape)} in the file and {tuple(expected[name].shape)} "
                "in the model",
                where=str(folder),
                fix="give the adapter's own base model as model.path",
            )
    return fitted


def bare_name(name: str) -> str:
    """Returns a name without wrappers, PEFT's prefix and the adapter's name."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    text = ".".join(parts).removeprefix("base_model.model.")
    return text.replace(".default.", ".").removesuffix(".default")
