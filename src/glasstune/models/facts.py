"""Facts of a model that data, training and generation need."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from glasstune.core.facts import ModelFacts
from glasstune.models.families.table import family_of


def model_facts(model: PreTrainedModel | PreTrainedConfig) -> ModelFacts:
    """Reads vocabulary, positions and packing from a model, or from its config alone.

    Args:
        model: A model (its embedding's real rows count) or a config.
    """
    config: Any = model
    rows: int | None = None
    if isinstance(model, PreTrainedModel):
        config = model.config
        embedding: Any = model.get_input_embeddings()
        rows = int(embedding.weight.shape[0]) if embedding is not None else None
    text = config.get_text_config(decoder=True)
    if rows is None:
        rows = int(text.vocab_size)
    can_pack, reason = _packing(text)
    return ModelFacts(
        family=str(config.model_type),
        vocabulary_rows=rows,
        max_positions=_max_positions(text),
        can_pack=can_pack,
        pack_reason=reason,
    )


def _max_positions(config: Any) -> int | None:
    """Returns the longest row, or None where positions have no limit (ALiBi)."""
    family = family_of(config)
    if (family is not None and family.positions == "alibi") or getattr(config, "alibi", False):
        return None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _packing(config: Any) -> tuple[bool, str]:
    family = family_of(config)
    if family is None:
        return False, f"the architecture {config.model_type} has no proven packing"
    how = {
        "documents": "each document is attended on its own",
        "mask": "a mask keeps documents apart",
        "blocks": "a mask keeps documents apart",
        "bloom": "ALiBi and mask restart with each document",
    }[family.packing]
    return True, f"{config.model_type}: {how}, positions restart; proven by test"
