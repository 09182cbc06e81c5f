"""Puts a family's packing onto a model, and says what each forward then needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from glasstune.core.errors import InputError
from glasstune.models.families import bloom, documents
from glasstune.models.families.table import family_of


def install_packing(model: PreTrainedModel) -> str:
    """Makes a model able to keep the documents of one row apart.

    Unpacked calls, evaluation and generation compute what they did before.

    Args:
        model: A causal language model, plain; install before adapters are added.

    Returns:
        How it is done, in words (for `run.json`).

    Raises:
        InputError: `cannot_pack`: the family has no proven packing.
    """
    family = family_of(model.config)
    if family is None:
        raise InputError(
            "cannot_pack",
            f"the architecture {model.config.model_type} has no proven packing",
            where="data.packing",
            fix="set data.packing=false",
        )
    if family.packing == "bloom":
        bloom.install(model)
        return "ALiBi and causal mask restart with each document"
    if family.packing == "documents" and _uses_documents(model):
        documents.register()
        model.set_attn_implementation(documents.NAME)
        if model.config._attn_implementation == documents.NAME:
            return "attention runs one document at a time"
    return "4-D mask from restarting positions"


def packing_kwargs(
    model: nn.Module, bounds: documents.Bounds, device: torch.device | str
) -> dict[str, Any]:
    """Returns what a packed forward needs beside `input_ids` and `position_ids`.

    Call `model(input_ids=..., position_ids=..., attention_mask=None, use_cache=False, **these)`;
    `attention_mask` is in the dictionary where the family needs one, so pass the mask through it.

    Args:
        model: A model that `install_packing` has seen, bare or with adapters around it.
        bounds: Per row the cumulative ends of its documents, from 0 to L.
        device: Where the forward runs.
    """
    config: Any = model.config
    family = family_of(config)
    if family is not None and family.packing == "bloom":
        return {"attention_mask": bloom.packed_mask(bounds, device)}
    if config._attn_implementation == documents.NAME:
        return {"attention_mask": None, documents.BOUNDS_KEYWORD: bounds}
    return {"attention_mask": None}


def _uses_documents(model: PreTrainedModel) -> bool:
    # On a GPU a loop over documents is bound by kernel launches; the mask is one kernel.
    # An attention that the user chose by name stays.
    return bool(model.device.type == "cpu" and model.config._attn_implementation == "sdpa")
