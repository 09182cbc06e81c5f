"""Which layers are recomputed in backward."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.units import format_bytes, parse_bytes


def enable_recompute(model: Any, config: Config, rows: int, choices: Choices) -> None:
    """Turns on recomputation of every decoder layer where asked, or where memory asks for it.

    Non-reentrant: gradients reach adapters although the embeddings are frozen, and per-term
    gradients stay possible.

    Args:
        model: A PEFT model.
        config: `training.recompute` and `max_memory`; a resolved value is written back.
        rows: Rows of one forward.
        choices: Where the decision is noted.
    """
    training = config.training
    if training.recompute == "auto":
        needed = _activation_bytes(model.config, rows * config.data.max_length)
        device = next(model.parameters()).device
        free = _free_bytes(device)
        if training.max_memory is not None:
            limit = parse_bytes(training.max_memory, where="training.max_memory")
            free = max(0, min(free, limit - _used_bytes(device)))
        fits = needed < free / 2
        training.recompute = choices.record(
            "training.recompute",
            "none" if fits else "full",
            f"activations of a forward take roughly {format_bytes(needed)}, "
            f"{format_bytes(free)} are free",
        )
    if training.recompute == "full":
        kwargs = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.20
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _activation_bytes(config: Any, tokens: int) -> int:
    """A rough upper bound of what a forward saves: 16 hidden and 6 MLP vectors a layer, fp32."""
    text = config.get_text_config(decoder=True)
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    layers = int(text.num_hidden_layers)
    return 4 * tokens * layers * (16 * hidden + 6 * inner)


def _used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return 0
    resident = Path("/proc/self/statm").read_text().split()[1]
    return int(resident) * os.sysconf("SC_PAGE_SIZE")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
