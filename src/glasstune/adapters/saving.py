"""Saving an adapter in PEFT's format, and reading it back to see that it is all there."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel

from glasstune.adapters.inject import trainable
from glasstune.adapters.reading import WEIGHTS
from glasstune.adapters.state import adapter_state
from glasstune.core.errors import RunError
from glasstune.core.files import disk_full_named
from glasstune.core.tensors import load_tensors, save_tensors


def save_adapter(
    model: PeftModel, folder: Path, base_name: str, base_fingerprint: str | None = None
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        model: The PEFT model.
        folder: Made if absent. Write it aside and rename it where it must be whole or absent.
        base_name: What the config names as its base model.
        base_fingerprint: That of the base model, which travels in the file's header.

    Raises:
        RunError: `disk_full`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(model)
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    with disk_full_named(folder, needed=_bytes(state)):
        marks = {} if base_fingerprint is None else {"glasstune_base": base_fingerprint}
        save_tensors(state, folder / WEIGHTS, {"format": "pt", **marks})
        config.save_pretrained(str(folder))


def verify_saved(model: PeftModel, folder: Path, *, learned: bool = True) -> None:
    """Reads a saved adapter back and compares it with the model.

    Args:
        model: The model that was saved, unchanged since.
        folder: Where `save_adapter` wrote.
        learned: Whether some `lora_B` must differ from zero; False before the first update.

    Raises:
        RunError: `save_damaged`: unreadable, or names, shapes, types, values or the file's size
            are not the model's; a trained tensor is not in the file; no B is nonzero.
    """
    path = folder / WEIGHTS
    state = adapter_state(model)
    try:
        saved = load_tensors(path)
    except Exception as error:  # safetensors has an error type of its own
        raise _damaged(path, f"the file cannot be read back: {error}") from error
    if saved.keys() != state.keys():
        differ = sorted(saved.keys() ^ state.keys())
        raise _damaged(path, f"{len(differ)} tensors are missing or too many: {differ[:4]}")
    for name, tensor in state.items():
        back = saved[name]
        if back.shape != tensor.shape or back.dtype != tensor.dtype:
            raise _damaged(path, f"{name} came back as {tuple(back.shape)} {back.dtype}")
        if tensor.numel() == 0:
            raise _damaged(path, f"{name} is empty")
        if not torch.equal(back, tensor.detach().cpu()):
            raise _damaged(path, f"{name} came back with other values")
    memory = {tensor.data_ptr() for tensor in state.values()}
    left_out = [name for name, p in trainable(model).items() if p.data_ptr() not in memory]
    if left_out:
        raise _damaged(path, f"{len(left_out)} trained tensors are not saved: {left_out[:4]}")
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    if path.stat().st_size != header + _bytes(state):
        raise _damaged(path, f"{path.stat().st_size} bytes instead of {header + _bytes(state)}")
    # What starts at zero: B of a linear layer, A of an embedding.
    ups = [t for name, t in saved.items() if "lora_B" in name or "lora_embedding_A" in name]
    if learned and ups and not any(bool(tensor.any()) for tensor in ups):
        raise _damaged(path, f"all {len(ups)} lora_B tensors are zero: nothing was learned")


def _bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _damaged(path: Path, says: str) -> RunError:
    return RunError(
        "save_damaged",
        says,
        where=str(path),
        fix="the last good checkpoint is untouched; save again (resume from it)",
    )
