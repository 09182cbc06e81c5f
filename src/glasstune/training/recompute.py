"""How many decoder layers forget their activations, and making them do so."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from glasstune.core.choices import Choices
from glasstune.core.config import TrainingConfig
from glasstune.core.errors import InputError
from glasstune.core.recompute import Recompute
from glasstune.core.units import format_bytes, parse_bytes
from glasstune.training.dropout import RowDropout
from glasstune.training.offload import Offload

# Beside the saved activations: the backward of one layer, the head's chunk, fragments.
RESERVE = 0.1
HEAD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What a forward keeps of one decoder layer for its backward.

    Args:
        kept: Bytes of a layer whose activations stay.
        input: Bytes of a recomputed one: its input.
        layers: Number of layers.
    """

    kept: int
    input: int
    layers: int

    def total(self, recomputed: int) -> int:
        """Bytes of all layers, and of the one whose activations are made again."""
        again = self.kept if recomputed == self.layers else 0
        return (self.layers - recomputed) * self.kept + recomputed * self.input + again


def layer_bytes(
    config: Any,
    rows: int,
    length: int,
    *,
    compiled: bool,
    itemsize: int,
    dropout: bool = False,
) -> LayerBytes:
    """Estimates what the decoder layers of a model keep.

    Compiled blocks of a Llama keep about six hidden vectors a token (both residual inputs, both
    normed ones, the query and the attention's output), key and value, and four vectors of the MLP
    (gate, up, their product, and that once more beside LoRA's columns). PEFT's own forward keeps
    ten hidden vectors, some of them float32 in place of bfloat16. Dropout adds a copy of the input
    of each adapted layer (seven of them), and a mask of bytes.

    Args:
        config: The model's.
        rows: Of one forward.
        length: Tokens of a row, padding included.
        compiled: Whether blocks are compiled.
        itemsize: Bytes of an activation.
        dropout: Whether adapters drop entries of their inputs.
    """
    text = config.get_text_config(decoder=True)
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "head_dim", None) or hidden // heads)
    layers = int(text.num_hidden_layers)
    kept = itemsize * ((6 if compiled else 10) * hidden + 2 * groups * width + 4 * inner)
    if dropout:
        kept += (itemsize + 1) * (6 * hidden + inner)
    if text.model_type == "bloom" or getattr(config, "_attn_implementation", "") == "eager":
        kept += heads * length * (4 + itemsize)  # the weights of all pairs, before and after a cast
    tokens = rows * length
    return LayerBytes(tokens * kept, tokens * hidden * itemsize, layers)


def choose_recompute(needs: LayerBytes, free: int) -> Recompute:
    """Recomputes as few layers as fit.

    Args:
        needs: Of the layers.
        free: Bytes that activations may take.

    Returns:
        The smallest number of layers that fits; all of them where none does.
    """
    for layers in range(needs.layers):
        if needs.total(layers) <= free:
            return Recompute(layers)
    return Recompute(needs.layers)


def resolve_recompute(
    model: Any,
    training: TrainingConfig,
    rows: int,
    length: int,
    choices: Choices,
    *,
    compiled: bool = False,
    itemsize: int = 4,
) -> Recompute:
    """Turns `training.recompute` into a number of layers, and notes it.

    Args:
        model: A PEFT model on its device.
        training: `recompute` and `max_memory`; a whole answer is written back.
        rows: Of one forward.
        length: Tokens of a row, padding included.
        choices: Where the decision is noted.
        compiled: Whether blocks will be compiled.
        itemsize: Bytes of an activation.
    """
    device = next(model.parameters()).device
    dropout = any(isinstance(part, RowDropout) for part in model.modules())
    needs = layer_bytes(
        model.config, rows, length, compiled=compiled, itemsize=itemsize, dropout=dropout
    )
    asked, count = training.recompute, needs.layers
    if asked == "offload" and device.type != "cuda":
        choices.record(
            "training.recompute", "full", f"offload asked for: on a {device.type} the inputs of "
            "recomputed layers are in host memory as it is",
        )  # fmt: skip
        chosen = Recompute(count)
    elif asked == "auto":
        free = _room(model, training, device)
        chosen = choose_recompute(needs, free)
        # Where a family can do all or nothing, a number between is all.
        if 0 < chosen.layers < count and not decoder_layers(model):
            chosen = Recompute(count)
        choices.record(
            "training.recompute",
            {0: "none", count: "full"}.get(chosen.layers, f"{chosen.layers} of {count} layers"),
            f"activations of a forward take roughly {format_bytes(needs.total(0))}, "
            f"{format_bytes(needs.total(chosen.layers))} with {chosen.layers} layers recomputed; "
            f"{format_bytes(free)} are free for them",
        )
    else:
        chosen = Recompute(0 if asked == "none" else count, offload=asked == "offload")
    if asked != "auto" or chosen.layers in (0, count):
        training.recompute = (
            "none" if chosen.layers == 0 else "offload" if chosen.offload else "full"
        )
    choices.record("recompute_layers", chosen.layers, f"of {count}; training.recompute is {asked}")
    return chosen


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that can each be recomputed alone, first to last; none in old families."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        kinds = [kind.__name__ for kind in type(module).__mro__]
        inside = any(path.startswith(f"{other}.") for other in found)
        if "GradientCheckpointingLayer" in kinds and not inside:
            found[path] = module
    return list(found.values())


def apply_recompute(model: Any, recompute: Recompute) -> Offload | None:
    """Makes the first layers forget their activations, and all others keep them.

    Non-reentrant: gradients reach adapters although the embeddings are frozen, and per-term
    gradients stay possible.

    Args:
        model: A PEFT model on its device, or a transformers model.
        recompute: How many layers.

    Returns:
        The store of inputs on the host, where they go there.

    Raises:
        InputError: `recompute_impossible`: the family cannot, or only in all layers at once.
    """
    layers: list[Any] = list(decoder_layers(model))
    offload = None
    function: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    if recompute.offload:
        offload = Offload(next(model.parameters()).device)
        function = offload.checkpoint
    if not layers:
        _whole_model(model, recompute, function)
        return offload
    if recompute.layers > len(layers):
        raise _impossible(f"{recompute.layers} layers are asked for, the model has {len(layers)}")
    for index, layer in enumerate(layers):
        layer._gradient_checkpointing_func = function
        layer.gradient_checkpointing = index < recompute.layers
    return offload


def _whole_model(model: Any, recompute: Recompute, function: Callable[..., Any]) -> None:
    """Old families have one switch, read in the model's own loop over its layers."""
    switches = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]
    if not switches and recompute.layers:
        raise _impossible(f"{type(model).__name__} has no switch for it")
    count = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    if 0 < recompute.layers < count:
        raise _impossible("the family recomputes all layers or none")
    for part in switches:
        part._gradient_checkpointing_func = function
        part.gradient_checkpointing = recompute.layers > 0


def _impossible(says: str) -> InputError:
    return InputError(
        "recompute_impossible",
        says,
        where="training.recompute",
        fix="set training.recompute to none, and fewer rows or a smaller max_length if it is too "
        "much then",
    )


def _room(model: nn.Module, training: TrainingConfig, device: torch.device) -> int:
    """Bytes that activations may take: what is free, less what comes beside them."""
    free = _free_bytes(device)
    if training.max_memory is not None:
        limit = parse_bytes(training.max_memory, where="training.max_memory")
        free = max(0, min(free, limit - _used_bytes(device)))
    trained = sum(part.numel() for part in model.parameters() if part.requires_grad)
    states = trained * (4 + (2 if training.optim == "adamw_8bit" else 8))
    beside = states + (HEAD_BYTES if device.type == "cuda" else 0)
    return max(0, int(free * (1 - RESERVE)) - beside)


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
