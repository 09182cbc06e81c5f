"""Sizes that no model can have; transformers builds some of them without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glasstune.core.errors import InputError

# A negative count of layers is an empty `range`, so the model would just be smaller.
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "n_embd",
    "d_model",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_key_value_heads",
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "head_dim",
)
# A dense model of a family of mixtures says 0 experts.
_NOT_NEGATIVE = ("moe_intermediate_size", "num_local_experts", "num_experts_per_tok")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_MOST_LAYERS = 10_000
_MOST = 2**31


def check_sizes(config: Any, content: Mapping[str, Any], *, where: str) -> None:
    """Refuses sizes that are not positive, far too large, or do not divide.

    Args:
        config: The parsed config.
        content: Its JSON as written; empty where there is none.
        where: For the message.

    Raises:
        InputError: `bad_model_config`, with key and value.
    """
    text = config.get_text_config(decoder=True)
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value = _shared(text, key)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        most = _MOST_LAYERS if key in _LAYERS else _MOST
        least = 0 if key in _NOT_NEGATIVE else 1
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most:,}"
            raise _bad(f"{key} is {value}; it must be {bound}", where)
    hidden, heads = _shared(text, "hidden_size"), _shared(text, "num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or hidden % heads == 0:
        return
    # Heads of a width of their own need not divide; a width that was derived must.
    written = content.get("text_config", content)
    given = isinstance(written, Mapping) and written.get("head_dim") is not None
    if not given and _shared(text, "head_dim") == hidden // heads:
        raise _bad(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is "
            "no head_dim",
            where,
        )


def _shared(config: Any, key: str) -> Any:
    """Returns a value that holds for every layer, or None where there is none.

    transformers refuses to give a value that layers may have of their own (Gemma 4's `head_dim`),
    by a RuntimeError.
    """
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


def first_line(error: BaseException) -> str:
    """Returns what an exception says, as one line without its wrapper's title."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if len(lines) > 1 and lines[0].endswith(":"):  # huggingface_hub's strict dataclasses
        return f"{lines[0].rstrip(':')}: {lines[1]}"
    if isinstance(error, KeyError):
        return f"unknown value {lines[0]}"
    return lines[0]


def _bad(message: str, where: str) -> InputError:
    return InputError("bad_model_config", message, where=where, fix="repair the value")
