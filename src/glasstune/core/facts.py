"""Facts about a model that other rooms need without importing the models room."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What data, training and generation must know of a base model.

    Args:
        family: `model_type` of the config, for example `llama`.
        vocabulary_rows: Rows of the input embedding; every id must be below.
        max_positions: Longest row the model can place, or None where it has no limit (ALiBi).
        can_pack: Whether documents may share a row without seeing each other.
        pack_reason: Why, or why not.
    """

    family: str
    vocabulary_rows: int
    max_positions: int | None
    can_pack: bool
    pack_reason: str
