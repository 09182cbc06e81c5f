"""A causal language model split before its head, so that full logits are never made.

The backbone gives hidden states; the head module and the family's function behind it (a scale, a
soft cap) turn any chunk of them into logits. Modules are looked up at every call, since PEFT may
wrap the head at any time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glasstune.core.choices import Choices

# What follows the head, by model_type: transformers writes it inline in each forward.
_MULTIPLIED = {"cohere": "logit_scale", "cohere2": "logit_scale"}
_DIVIDED = {
    "granite": "logits_scaling",
    "granitemoe": "logits_scaling",
    "granitemoeshared": "logits_scaling",
}
_CAPPED = ("gemma2", "gemma3_text")
_PROBE_TOKENS = 8


def causal_model(model: nn.Module) -> Any:
    """Returns the transformers model inside a PEFT model, or the model itself."""
    anything: Any = model
    return anything.get_base_model() if hasattr(anything, "get_base_model") else anything


class HeadSplit:
    """The two halves of a model. Make it with `split_head`.

    Args:
        proven: Whether head(hidden) was seen to equal the model's own logits. Where it is False
            use `full_logits`, and say `reason`.
        reason: Why, in one sentence.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.proven = False
        self.reason = "not checked"

    def hidden(self, model: nn.Module, **inputs: Any) -> Tensor:
        """Runs the backbone.

        Args:
            model: The model, plain or with adapters.
            **inputs: What its forward takes (`input_ids`, `position_ids`, ...).

        Returns:
            The last hidden state after the final norm, [R, L, d].
        """
        backbone = causal_model(model).base_model
        inputs.setdefault("use_cache", False)
        hidden: Tensor = backbone(**inputs, return_dict=True)[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Runs the head module and the family's function behind it.

        Args:
            hidden: Hidden states of any leading shape, [..., d].

        Returns:
            Logits [..., V] in the head's dtype.
        """
        causal = causal_model(self._model)
        head: nn.Module = causal.get_output_embeddings()
        return _after_head(causal, head(hidden))

    def full_logits(self, model: nn.Module, **inputs: Any) -> Tensor:
        """Runs the whole model as its forward is written, [R, L, V]: the road without a split."""
        inputs.setdefault("use_cache", False)
        logits: Tensor = causal_model(model)(**inputs).logits
        return logits

    @property
    def weight(self) -> Tensor:
        """The head's weight [V, d]."""
        weight: Tensor = causal_model(self._model).get_output_embeddings().weight
        return weight

    @property
    def bare(self) -> bool:
        """Whether logits are hidden @ weight.T and nothing else, with a frozen weight."""
        causal = causal_model(self._model)
        head = causal.get_output_embeddings()
        plain = type(head) is nn.Linear
        return bool(
            self.proven
            and plain
            and head.bias is None
            and not head.weight.requires_grad
            and not head._forward_hooks
            and not head._forward_pre_hooks
            and not _has_post_function(causal)
        )


def split_head(model: nn.Module) -> HeadSplit:
    """Splits a model before its head and checks the split on a few tokens.

    Args:
        model: A causal language model, plain or with adapters; its state is left as it was.
    """
    split = HeadSplit(model)
    causal = causal_model(model)
    head = causal.get_output_embeddings()
    if head is None:
        split.reason = f"{type(causal).__name__} names no output embeddings"
        return split
    training = [module for module in causal.modules() if module.training]
    causal.eval()
    try:
        rows = causal.get_input_embeddings().weight.shape[0]
        device = causal.get_input_embeddings().weight.device
        ids = (torch.arange(_PROBE_TOKENS, device=device) * 7919 % rows).unsqueeze(0)
        with torch.no_grad():
            whole = split.full_logits(model, input_ids=ids).float()
            halves = split.logits(split.hidden(model, input_ids=ids)).float()
    finally:
        for module in training:
            module.training = True
    # Both roads run the same operations on the same numbers; a scale or a cap that is not known
    # here moves logits by per cents.
    worst = float((whole - halves).abs().max())
    split.proven = worst <= 1e-3 * max(1.0, float(whole.abs().max()))
    split.reason = (
        "head(hidden) equals the model's logits on a probe"
        if split.proven
        else f"head(hidden) differs from the model's logits by {worst:.3g} on a probe"
    )
    return split


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def fold_head(model: nn.Module, choices: Choices | None = None) -> bool:
    """Lets a head do itself what follows it, where that is a scale of its rows and it is frozen.

    Call it when no adapter will be added any more. Another model passes unchanged.

    Args:
        model: A causal language model, plain or with adapters.
        choices: Where it is noted.

    Returns:
        Whether nothing but the head's product is left.
    """
    causal = causal_model(model)
    if not hasattr(causal, "fold_head"):
        return not _has_post_function(causal)
    before = causal.bare_head()
    folded = bool(causal.fold_head())
    if choices is not None and not (folded and before):
        reason = (
            "the head is frozen: its rows are scaled to length one once"
            if folded
            else "the head is trained: each logit is divided by the length of its row"
        )
        choices.record("model.folded_head", folded, reason)
    return folded


def _has_post_function(causal: Any) -> bool:
    if hasattr(causal, "bare_head"):
        return not causal.bare_head()
    text = _text_config(causal.config)
    kind = text.model_type
    capped = kind in _CAPPED and getattr(text, "final_logit_softcapping", None) is not None
    return kind in _MULTIPLIED or kind in _DIVIDED or capped


def _after_head(causal: Any, logits: Tensor) -> Tensor:
    if hasattr(causal, "after_head"):
        own: Tensor = causal.after_head(logits)
        return own
    text = _text_config(causal.config)
    kind = text.model_type
    if kind in _MULTIPLIED:
        return logits * float(getattr(text, _MULTIPLIED[kind]))
    if kind in _DIVIDED:
        return logits / float(getattr(text, _DIVIDED[kind]))
    cap = getattr(text, "final_logit_softcapping", None) if kind in _CAPPED else None
    return logits if cap is None else torch.tanh(logits / cap) * cap
