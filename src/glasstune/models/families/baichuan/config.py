"""Baichuan's config, and which of its four models a checkpoint's `config.json` describes.

All four carry `model_type: baichuan`. What tells them apart is read from facts that the published
configs hold, unless `alibi` or `normalize_head` stand there:

| checkpoint | positions | head |
|---|---|---|
| Baichuan-7B, Baichuan2-7B | RoPE: hidden size 4096, `max_position_embeddings` | |
| Baichuan-13B, Baichuan2-13B | ALiBi: hidden size 5120, `model_max_length` alone | |
| Baichuan-7B, Baichuan-13B | | plain: 64,000 entries |
| Baichuan2-7B, Baichuan2-13B | | normalised: 125,696 entries, `z_loss_weight` |
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from glasstune.core.choices import WARNING, Choice

_ROPE_WIDTH, _ALIBI_WIDTH = 4096, 5120
_FIRST_VOCABULARY, _SECOND_VOCABULARY = 64_000, 125_696
_LONGEST = 4096


@strict
class BaichuanConfig(LlamaConfig):
    """Config of Baichuan and Baichuan2 at 7B and 13B, and of smaller models of their kind.

    Args:
        alibi: ALiBi instead of RoPE; None: by the checkpoint's other keys.
        normalize_head: Rows of the head are scaled to length one; None: likewise.
        model_max_length: Longest row that it was trained on, as the 13B models write it.
        z_loss_weight: Kept for the checkpoint's own code; the loss does not read it.
    """

    model_type = "baichuan"
    base_model_tp_plan = None
    base_model_pp_plan = None

    vocab_size: int = _SECOND_VOCABULARY
    max_position_embeddings: int | None = None
    pad_token_id: int | None = 0
    model_max_length: int | None = None
    z_loss_weight: float | int | None = None
    alibi: bool | None = None
    normalize_head: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        positions = _positions(self)
        head = _head(self)
        self.alibi, self.normalize_head = positions.value == "alibi", head.value == "normalised"
        if self.max_position_embeddings is None:
            self.max_position_embeddings = self.model_max_length or _LONGEST
        self.num_key_value_heads = self.num_attention_heads  # one product makes all three
        super().__post_init__(**kwargs)
        self._choices = [positions, head, *_warnings(self)]

    def native_choices(self) -> list[Choice]:
        """Returns what was read from the checkpoint's keys, with reasons."""
        return list(self._choices)

    def to_dict(self) -> dict[str, Any]:
        """Returns the keys of `config.json`."""
        content: dict[str, Any] = super().to_dict()
        content.pop("_choices", None)
        return content


def _positions(config: Any) -> Choice:
    name = "model.positions"
    if config.alibi is not None:
        return Choice(name, _scheme(config.alibi), "config.json says so: alibi")
    if config.hidden_size in (_ROPE_WIDTH, _ALIBI_WIDTH):
        size = "7B, which has RoPE" if config.hidden_size == _ROPE_WIDTH else "13B, which has ALiBi"
        value = _scheme(config.hidden_size == _ALIBI_WIDTH)
        return Choice(name, value, f"hidden size {config.hidden_size} is that of {size}")
    if config.max_position_embeddings is None and config.model_max_length is not None:
        reason = "model_max_length without max_position_embeddings is how the 13B models write it"
        return Choice(name, "alibi", f"{reason}, which have ALiBi")
    return Choice(name, "rope", "max_position_embeddings is how the 7B models write it")


def _scheme(alibi: bool) -> str:
    return "alibi" if alibi else "rope"


def _head(config: Any) -> Choice:
    name = "model.head"
    if config.normalize_head is not None:
        value = "normalised" if config.normalize_head else "plain"
        return Choice(name, value, "config.json says so: normalize_head")
    if config.vocab_size == _FIRST_VOCABULARY:
        return Choice(name, "plain", "64,000 entries are the first generation's")
    if config.vocab_size == _SECOND_VOCABULARY:
        reason = "125,696 entries are the second generation's: rows of length one"
        return Choice(name, "normalised", reason)
    if config.z_loss_weight is not None:
        reason = "only the second generation's config has z_loss_weight: rows of length one"
        return Choice(name, "normalised", reason)
    return Choice(name, "plain", "config.json names nothing of the second generation")


def _warnings(config: Any) -> list[Choice]:
    if not config.z_loss_weight:
        return []
    reason = (
        f"{WARNING}config.json has z_loss_weight {config.z_loss_weight:g}, which is not added to "
        "the loss; add {name: z_loss, weight: ...} to losses for one"
    )
    return [Choice("model.z_loss_weight", config.z_loss_weight, reason)]
