"""What is known of each architecture, by `model_type`. A family stands here when a test proves it.

`packing` names the way documents of one row are kept apart:

- `documents`: on a CPU one causal product a document (`documents.py`), on a GPU `flex_attention`
  inside each document (`flex.py`); where neither can, the 4-D mask that transformers makes from
  restarting positions.
- `mask`: the same without `documents.py`, which does not compute what the family's attention does
  (a soft cap).
- `blocks`: a 4-D mask of our own (`masks.py`): transformers makes none for it (Falcon in 5.17), or
  its layers do not hand keywords on. Only for families without sliding windows.
- `bloom`: on a GPU `bloom_flex.py`, else `bloom.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Packing = Literal["documents", "mask", "blocks", "bloom"]
Positions = Literal["rope", "learned", "alibi"]


@dataclass(frozen=True, slots=True)
class Family:
    """Facts of one architecture.

    Args:
        packing: The proven way to isolate documents.
        positions: How it encodes positions; `learned` tables end, ALiBi has no limit.
        attention: Implementation that must be used, or None where sdpa is right.
    """

    packing: Packing
    positions: Positions = "rope"
    attention: str | None = None


FAMILIES: dict[str, Family] = {
    "baichuan": Family("documents"),
    "bloom": Family("bloom", "alibi"),
    "cohere": Family("documents"),
    "cohere2": Family("documents"),
    "exaone4": Family("documents"),
    "falcon": Family("blocks"),
    "gemma": Family("documents"),
    "gemma2": Family("mask", attention="eager"),
    "gemma3_text": Family("documents"),
    "glm4": Family("documents"),
    "gpt2": Family("documents", "learned"),
    "gpt_neox": Family("documents"),
    "gptj": Family("documents"),
    "granite": Family("documents"),
    "llama": Family("documents"),
    "mistral": Family("documents"),
    "mixtral": Family("documents"),
    "olmo": Family("documents"),
    "olmo2": Family("documents"),
    "olmo3": Family("documents"),
    "opt": Family("documents", "learned"),
    "phi": Family("documents"),
    "phi3": Family("documents"),
    "qwen2": Family("documents"),
    "qwen3": Family("documents"),
    "qwen3_moe": Family("documents"),
    "smollm3": Family("documents"),
    "stablelm": Family("blocks"),
    "starcoder2": Family("documents"),
}

_WITH_ALIBI = {"baichuan": Family("documents", "alibi")}
"""Families that have a second kind of positions, where their config says `alibi`."""


def family_of(config: Any) -> Family | None:
    """Returns the facts of a config's architecture, or None where nothing is proven.

    A config that contradicts its family's entry (a Falcon with ALiBi, code that came with the
    checkpoint) counts as unknown.
    """
    if getattr(config, "auto_map", None) and not is_builtin(config):
        return None
    kind = str(getattr(config, "model_type", ""))
    family = FAMILIES.get(kind)
    if getattr(config, "alibi", False) and kind in _WITH_ALIBI:
        return _WITH_ALIBI[kind]
    if family is not None and family.positions != "alibi" and getattr(config, "alibi", False):
        return None
    return family


def is_builtin(config: Any) -> bool:
    """Whether the config's class is transformers' own or ours, so its modelling code is too."""
    return type(config).__module__.startswith(("transformers.models.", "glasstune."))
