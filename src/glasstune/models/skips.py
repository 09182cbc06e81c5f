"""Which layers a conversion leaves at 16 bit: transformers' list, each key with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

SkipReason = Literal["user", "float32", "head", "tied", "last", "default"]


def skip_keys(model: nn.Module, asked: Sequence[str] | None) -> dict[str, SkipReason]:
    """Returns the keys of what is not converted, each with why it is on the list.

    The keys are transformers' own: both sides of tied weights, the module of the last parameter,
    the output embedding. A list of the user's replaces them; what must stay float32 is always on
    it. A module that is not transformers' gets the same by its own attributes.

    Args:
        model: Before its conversion.
        asked: `llm_int8_skip_modules`, or None.
    """
    tied, last, head = _defaults(model)
    if isinstance(model, PreTrainedModel):
        kept = sorted(getattr(model, "_keep_in_fp32_modules", None) or ())
        given = None if asked is None else list(asked)
        keys = HfQuantizer.get_modules_to_not_convert(model, given, kept)
    else:
        kept = []
        keys = list(asked) if asked is not None else [*tied, *last, *head]
    found: dict[str, SkipReason] = {}
    for key in sorted(keys):
        if asked is not None and key in asked:
            found[key] = "user"
        elif key in kept:
            found[key] = "float32"
        elif key in tied:
            found[key] = "tied"
        elif key in head:
            found[key] = "head"
        else:
            found[key] = "last" if key in last else "default"
    return found


def eligible(model: nn.Module, asked: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """Returns paths and layers that a conversion takes: exactly `nn.Linear` or `Conv1D`, not kept.

    Args:
        model: Before its conversion.
        asked: `llm_int8_skip_modules`, or None.
    """
    keep = list(skip_keys(model, asked))
    return [
        (path, module)
        for path, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(path, keep)
    ]


def matches(path: str, key: str) -> bool:
    """Whether a skip key holds for a module, by the installed transformers' own matching."""
    return not should_convert_module(path, [key])


def tied_partners(model: nn.Module) -> dict[str, str]:
    """Returns each tied weight's module with the name of the parameter that shares its weight."""
    declared = getattr(model, "all_tied_weights_keys", None)
    pairs = list(declared.items()) if isinstance(declared, dict) else []
    if not isinstance(model, PreTrainedModel):
        for names in _shared_names(model):
            pairs += zip(names[1:], names[:-1], strict=True)
    partners: dict[str, str] = {}
    for target, source in pairs:
        partners[target.removesuffix(".weight")] = source
        partners.setdefault(source.removesuffix(".weight"), target)
    return partners


def _defaults(model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Returns the default keys: tied, last parameter's, output embedding's."""
    tied_map = getattr(model, "all_tied_weights_keys", None)
    tied = {*tied_map.keys(), *tied_map.values()} if isinstance(tied_map, dict) else set()
    if not isinstance(model, PreTrainedModel):
        tied |= {name for names in _shared_names(model) for name in names}
    names = [name for name, _ in model.named_parameters()]
    find = getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) else None
    head = [name for name, part in model.named_modules() if output is not None and part is output]
    return (
        [name.removesuffix(".weight") for name in sorted(tied)],
        [name.removesuffix(".weight") for name in names[-1:]],
        head,
    )


def _shared_names(model: nn.Module) -> list[list[str]]:
    """Returns the names of each parameter that more than one name leads to."""
    by_id: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(value), []).append(name)
    return [names for names in by_id.values() if len(names) > 1]
