"""Baichuan's modules: those of Llama, but for one product that makes queries, keys and values.

Named as in the checkpoints, so that adapters on `W_pack` fit both ways. Positions come from RoPE
(7B) or from ALiBi (13B), whose penalty on distance joins the mask. Rows of the second generation's
head are scaled to length one, see `head`.

Shape letters: R rows, H heads, L tokens of a row, D width of a head.
"""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

from glasstune.models.families import documents, flex
from glasstune.models.families.baichuan.alibi import biased_mask, slopes
from glasstune.models.families.baichuan.config import BaichuanConfig
from glasstune.models.families.baichuan.head import fold, is_folded, scaled_logits

# transformers 5.18 renamed a forward's past_key_values.
_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else (
    "past_key_values"
)  # fmt: skip
_FORWARD = frozenset(inspect.signature(LlamaForCausalLM.forward).parameters)
_TAKES_BIAS = ("eager", "sdpa", documents.NAME, flex.NAME)


class BaichuanAttention(nn.Module):
    """Attention whose queries, keys and values are the three thirds of one product.

    Args:
        config: Of the model.
        layer_idx: Number of the layer, its place in the cache.
    """

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width = config.num_attention_heads * self.head_dim
        self.W_pack = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            hidden_states: [R, L, d].
            position_embeddings: Cosines and sines [R, L, D]; None with ALiBi.
            attention_mask: As the attention function takes it, with ALiBi's penalty in it.
            cache: Keys and values so far, or None.
            past_key_values: Its name in older versions of transformers.
            **kwargs: For the attention function.

        Returns:
            [R, L, d], and the attention weights where the function makes them.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        thirds = self.W_pack(hidden_states).chunk(3, dim=-1)
        q_RHLD, k_RHLD, v_RHLD = (third.view(shape).transpose(1, 2) for third in thirds)
        if position_embeddings is not None:
            q_RHLD, k_RHLD = llama.apply_rotary_pos_emb(q_RHLD, k_RHLD, *position_embeddings)
        past = past_key_values if cache is None else cache
        if past is not None:
            k_RHLD, v_RHLD = past.update(k_RHLD, v_RHLD, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward
        )
        attended_RLHD, weights = attend(
            self, q_RHLD, k_RHLD, v_RHLD, attention_mask, scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0, **kwargs,
        )  # fmt: skip
        return self.o_proj(attended_RLHD.flatten(-2)), weights


class BaichuanMLP(llama.LlamaMLP):
    """SwiGLU: `gate_proj`, `up_proj`, `down_proj`."""


class BaichuanRMSNorm(llama.LlamaRMSNorm):
    """Root mean square normalisation in float32."""


class BaichuanDecoderLayer(llama.LlamaDecoderLayer):
    """Llama's layer around our attention.

    Args:
        config: Of the model.
        layer_idx: Number of the layer.
    """

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # Llama's own would make its three projections
        self.hidden_size = config.hidden_size
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = BaichuanRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = BaichuanRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class BaichuanPreTrainedModel(llama.LlamaPreTrainedModel):
    """What both models share."""

    config_class = BaichuanConfig
    config: BaichuanConfig
    _no_split_modules = ("BaichuanDecoderLayer",)
    _can_record_outputs = {"hidden_states": BaichuanDecoderLayer, "attentions": BaichuanAttention}  # noqa: RUF012
    # Tables that the published code keeps in its checkpoints and computes again.
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq", r"alibi_mask", r"future_mask")


class BaichuanAlibi(nn.Module):
    """Stands where RoPE's tables would be made: ALiBi has none, its penalty is in the mask.

    Args:
        heads: Number of heads.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Returns None: queries and keys are not rotated."""

    def extra_repr(self) -> str:
        """Returns what the tree shows."""
        return f"heads={self.heads}"


class BaichuanModel(BaichuanPreTrainedModel, LlamaModel):
    """Embeddings, layers and the last norm.

    Args:
        config: Of the model.
    """

    def __init__(self, config: BaichuanConfig) -> None:
        llama.LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [BaichuanDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = BaichuanRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = (
            BaichuanAlibi(config.num_attention_heads)
            if config.alibi
            else llama.LlamaRotaryEmbedding(config)
        )
        self.gradient_checkpointing = False
        self.post_init()

    @wraps(LlamaModel.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the layers as Llama does; with ALiBi the mask carries the penalty."""
        if self.config.alibi:
            embeds = kwargs.pop("inputs_embeds", None)
            if input_ids is not None:
                embeds, input_ids = self.embed_tokens(input_ids), None
            kwargs["inputs_embeds"] = embeds
            attention_mask, keywords = self._penalty(embeds, attention_mask, position_ids, kwargs)
            kwargs |= keywords
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    def _penalty(
        self,
        embeds_RLd: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Returns the mask with ALiBi in it, or the slopes for functions that add it themselves."""
        kind = self.config._attn_implementation
        if kind not in _TAKES_BIAS:
            raise ValueError(f"attention {kind!r} takes no ALiBi; use sdpa or eager")
        slopes_H = slopes(self.config.num_attention_heads, embeds_RLd.device)
        if any(kwargs.get(k) is not None for k in (documents.BOUNDS_KEYWORD, flex.BLOCKS_KEYWORD)):
            return mask, {documents.SLOPES_KEYWORD: slopes_H}
        past = kwargs.get(_CACHE)
        flat = mask is None or mask.ndim == 2
        if kind == flex.NAME and past is None and position_ids is None and flat:
            return flex.no_mask(embeds_RLd.device), {
                documents.SLOPES_KEYWORD: slopes_H,
                flex.BLOCKS_KEYWORD: flex.unpacked_blocks(embeds_RLd, mask),
            }
        seen = create_causal_mask(
            config=self.config, inputs_embeds=embeds_RLd, attention_mask=mask,
            position_ids=position_ids, **{_CACHE: past},
        )  # fmt: skip
        if seen is not None and seen.numel() == 0:
            return mask, {}  # packed rows without bounds: the attention function says so
        before = 0 if past is None else int(past.get_seq_length())
        length = embeds_RLd.shape[1]
        joined = biased_mask(slopes_H, seen, (length, before + length), embeds_RLd.dtype, before)
        return joined, {}


class BaichuanForCausalLM(BaichuanPreTrainedModel, LlamaForCausalLM):
    """The language model.

    Args:
        config: Of the model.
    """

    def __init__(self, config: BaichuanConfig) -> None:
        llama.LlamaPreTrainedModel.__init__(self, config)
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @wraps(LlamaForCausalLM.forward)
    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs backbone and head as Llama does; logits are divided where the head asks for it."""
        if not self.config.normalize_head:
            return super().forward(*args, labels=labels, return_dict=return_dict, **kwargs)
        out = super().forward(*args, return_dict=True, **kwargs)
        logits, loss = self.after_head(out.logits), None
        if labels is not None:
            rest = {key: value for key, value in kwargs.items() if key not in _FORWARD}
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **rest
            )
        out = type(out)(**{**out, "loss": loss, "logits": logits})
        whole = self.config.return_dict if return_dict is None else return_dict
        return out if whole else out.to_tuple()

    def after_head(self, logits: Tensor) -> Tensor:
        """Returns what follows the head's product, [..., V]: the division by its rows' lengths."""
        return scaled_logits(self.lm_head, logits) if self.config.normalize_head else logits

    def bare_head(self) -> bool:
        """Whether nothing follows the head's product."""
        return not self.config.normalize_head or is_folded(self.lm_head)

    def fold_head(self) -> bool:
        """Scales the rows of a frozen head in place, once; False where it is trained or adapted."""
        return not self.config.normalize_head or fold(self.lm_head)
