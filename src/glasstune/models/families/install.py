"""Puts a family's packing onto a model, and says what each forward then needs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glasstune.core.errors import InputError
from glasstune.models.families import bloom, bloom_flex, documents, flex
from glasstune.models.families.masks import additive, block_mask
from glasstune.models.families.table import Family, family_of, is_builtin

_PROBE = (0, 5, 10)
# Two blocks of flex_attention with borders inside them: shorter rows take another kernel.
_FLEX_PROBE = (0, 90, 170, 256)


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
    how = _install(model, family, compiled)
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
    if config._attn_implementation in (flex.NAME, flex.CAPPED_NAME):
        alibi = family is not None and family.positions == "alibi"
        capped = alibi or config._attn_implementation == flex.CAPPED_NAME
        window = getattr(config, "sliding_window", None)
        blocks = flex.packed_blocks(bounds, device, window=window, capped=capped)
        return {"attention_mask": flex.no_mask(device), flex.BLOCKS_KEYWORD: blocks}
    if family is not None and family.packing == "bloom" and bloom_flex.installed(model):
        return {"attention_mask": bloom_flex.numbers_as_mask(flex.document_numbers(bounds, device))}
    if family is not None and family.packing in ("bloom", "blocks"):
        allowed = block_mask(bounds, device)
        plain = family.packing == "blocks" and config._attn_implementation == "sdpa"
        return {"attention_mask": allowed if plain else additive(allowed)}
    return {"attention_mask": None}


def padded_kwargs(model: nn.Module, attention_mask: Tensor) -> dict[str, Any]:
    """Returns what a forward of rows that are not packed needs beside `input_ids`.

    Padding stands at the end of a row, where no token of a causal model looks: a mask would change
    nothing that counts, attention with one is slower, and transformers waits for the device to
    read it. Code that came with a checkpoint gets it: nothing is known of it.

    Args:
        model: A causal language model, bare or with adapters around it.
        attention_mask: int64 [R, L]; 1 on tokens, then 0.
    """
    config: Any = model.config
    return {"attention_mask": None if is_builtin(config) else attention_mask}


def _install(model: PreTrainedModel, family: Family, compiled: bool) -> str:
    """Puts the best way that works here onto the model; returns it in words."""
    config: Any = model.config
    if family.packing == "blocks":
        return "block-causal 4-D mask"
    instead = flex.why_not(config, model.device)
    if family.packing == "bloom":
        if instead is None:
            bloom_flex.install(model)
            return "flex_attention with ALiBi inside each document"
        bloom.install(model)
        return _with_reason("ALiBi and causal mask restart with each document", model, instead)
    # An attention that the user chose by name stays.
    if config._attn_implementation == (family.attention or "sdpa"):
        if instead is None:
            flex.register()
            name = flex.NAME if family.packing == "documents" else flex.CAPPED_NAME
            model.set_attn_implementation(name)
        elif family.packing == "documents" and _on_cpu(model) and not compiled:
            documents.register()
            model.set_attn_implementation(documents.NAME)
    else:
        instead = f"the attention is {config._attn_implementation}, by name"
    # Some families do not let it be set in older versions of transformers.
    if config._attn_implementation == documents.NAME:
        return "attention runs one document at a time"
    if config._attn_implementation in (flex.NAME, flex.CAPPED_NAME):
        return "flex_attention inside each document; rows of one document need no mask"
    if instead is None:
        instead = "this version of transformers does not let the attention be set"
    return _with_reason("4-D mask from positions", model, instead)


def install_attention(model: nn.Module) -> str | None:
    """Replaces the attention of a model whose rows are not packed, where ours is far faster.

    That is ALiBi on a GPU: BLOOM's own attention makes every score, Baichuan's reads a penalty for
    each from memory; other families run torch's causal kernel as they are. `install_packing` does
    it too.

    Args:
        model: A causal language model, bare or with adapters around it.

    Returns:
        What was done, in words, or None.
    """
    config: Any = getattr(model, "config", None)
    family = family_of(config)
    if family is None or family.positions != "alibi":
        return None
    if flex.why_not(config, next(model.parameters()).device) is not None:
        return None
    if family.packing == "bloom":
        bloom_flex.install(model)
    elif not _switch(model, "sdpa", flex.NAME):
        return None
    return "flex_attention with ALiBi"


def attention_installed(model: nn.Module) -> bool:
    """Whether the model's attention is one that `install_attention` puts there."""
    config: Any = getattr(model, "config", None)
    family = family_of(config)
    ours = family is not None and family.positions == "alibi" and family.packing == "documents"
    return bloom_flex.installed(model) or (ours and config._attn_implementation == flex.NAME)


def uninstall_attention(model: nn.Module) -> None:
    """Takes back what `install_attention` did; another model passes unchanged."""
    if bloom_flex.installed(model):
        bloom_flex.uninstall(model)
    elif attention_installed(model):
        _switch(model, flex.NAME, "sdpa")


def _switch(model: Any, before: str, after: str) -> bool:
    """Sets the attention by name where it is the one before; an attention chosen by name stays."""
    if model.config._attn_implementation != before:
        return False
    flex.register()
    model.set_attn_implementation(after)
    return bool(model.config._attn_implementation == after)


def _with_reason(how: str, model: PreTrainedModel, instead: str) -> str:
    # On a CPU flex_attention was never a choice.
    return how if _on_cpu(model) else f"{how}: {instead}"


def _on_cpu(model: PreTrainedModel) -> bool:
    return bool(model.device.type == "cpu")


def _leak(model: PreTrainedModel) -> float:
    """Returns how far a document's logits move when the one before it changes, 0 = not at all."""
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    named = model.config._attn_implementation in (flex.NAME, flex.CAPPED_NAME)
    ends = _FLEX_PROBE if named or bloom_flex.installed(model) else _PROBE
    count = torch.arange(ends[-1], device=device)
    one = (count * 7919 % embedding.weight.shape[0]).unsqueeze(0)
    other = torch.where(count < ends[1], (one + 1) % embedding.weight.shape[0], one)
    sizes = [torch.arange(end - start) for start, end in pairwise(ends)]
    positions = torch.cat(sizes).to(device).unsqueeze(0)
    extra = packing_kwargs(model, (ends,), device)
    training = [module for module in model.modules() if module.training]
    model.eval()

    def later(ids: Tensor) -> Tensor:
        out = model(input_ids=ids, position_ids=positions, use_cache=False, **extra)
        logits: Tensor = out.logits[0, ends[1] :]
        return logits.float()

    try:
        with torch.no_grad():
            before, after = later(one), later(other)
    finally:
        for module in training:
            module.training = True
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-30))


def _cannot_pack(says: str) -> InputError:
    return InputError("cannot_pack", says, where="data.packing", fix="set data.packing=false")
