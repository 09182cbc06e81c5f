"""Puts a family's packing onto a model, and says what each forward then needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glasstune.core.errors import InputError
from glasstune.models.families import bloom, documents
from glasstune.models.families.masks import additive, block_mask
from glasstune.models.families.table import family_of

_PROBE = 5  # tokens of each of the two documents of the probe


def install_packing(model: PreTrainedModel, *, compiled: bool = False) -> str:
    """Makes a model able to keep the documents of one row apart, and looks whether it does.

    Unpacked calls, evaluation and generation compute what they did before.

    Args:
        model: A causal language model, plain; install before adapters are added.
        compiled: Whether its blocks will be compiled: then no way whose calls differ by the bounds
            of the documents, which would be compiled again for every batch.

    Returns:
        How it is done, in words (for `run.json`).

    Raises:
        InputError: `cannot_pack`: the family has no proven packing, or (another version of
            transformers) a document sees the one before it.
    """
    family = family_of(model.config)
    if family is None:
        raise _cannot_pack(f"the architecture {model.config.model_type} has no proven packing")
    if family.packing == "bloom":
        bloom.install(model)
        how = "ALiBi and causal mask restart with each document"
    elif family.packing == "blocks":
        how = "block-causal 4-D mask"
    else:
        if family.packing == "documents" and _uses_documents(model) and not compiled:
            documents.register()
            model.set_attn_implementation(documents.NAME)
        # Some families do not let it be set in older versions of transformers.
        alone = model.config._attn_implementation == documents.NAME
        how = "attention runs one document at a time" if alone else "4-D mask from positions"
    if any(type(part).__name__ == "Linear8bitLt" for part in model.modules()):
        # Its outlier columns are those of all tokens of a batch, packed or not, so a document's
        # rounding depends on its neighbours and the probe could not tell.
        return f"{how}; LLM.int8 still picks outlier columns over the whole batch"
    leak = _leak(model)
    if leak > 1e-3:
        raise _cannot_pack(
            f"with this version of transformers a document of {model.config.model_type} sees the "
            f"one before it in the row (logits move by {leak:.2g} of their size)"
        )
    return how


def packing_kwargs(
    model: nn.Module, bounds: documents.Bounds, device: torch.device | str
) -> dict[str, Any]:
    """Returns what a packed forward needs beside `input_ids` and `position_ids`.

    Call `model(input_ids=..., position_ids=..., use_cache=False, **these)`; `attention_mask` is
    among them.

    Args:
        model: A model that `install_packing` has seen, bare or with adapters around it.
        bounds: Per row the cumulative ends of its documents, from 0 to L.
        device: Where the forward runs.
    """
    config: Any = model.config
    family = family_of(config)
    if config._attn_implementation == documents.NAME:
        return {"attention_mask": None, documents.BOUNDS_KEYWORD: bounds}
    if family is not None and family.packing in ("bloom", "blocks"):
        allowed = block_mask(bounds, device)
        plain = family.packing == "blocks" and config._attn_implementation == "sdpa"
        return {"attention_mask": allowed if plain else additive(allowed)}
    return {"attention_mask": None}


def _leak(model: PreTrainedModel) -> float:
    """Returns how far a document's logits move when the one before it changes, 0 = not at all."""
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    count = torch.arange(2 * _PROBE, device=device)
    one = (count * 7919 % embedding.weight.shape[0]).unsqueeze(0)
    other = torch.where(count < _PROBE, (one + 1) % embedding.weight.shape[0], one)
    positions = (count % _PROBE).unsqueeze(0)
    extra = packing_kwargs(model, ((0, _PROBE, 2 * _PROBE),), device)
    training = [module for module in model.modules() if module.training]
    model.eval()

    def second(ids: Tensor) -> Tensor:
        out = model(input_ids=ids, position_ids=positions, use_cache=False, **extra)
        logits: Tensor = out.logits[0, _PROBE:]
        return logits.float()

    try:
        with torch.no_grad():
            before, after = second(one), second(other)
    finally:
        for module in training:
            module.training = True
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-30))


def _cannot_pack(says: str) -> InputError:
    return InputError("cannot_pack", says, where="data.packing", fix="set data.packing=false")


def _uses_documents(model: PreTrainedModel) -> bool:
    # On a GPU a loop over documents is bound by kernel launches; the mask is one kernel.
    # An attention that the user chose by name stays.
    return bool(model.device.type == "cpu" and model.config._attn_implementation == "sdpa")
