"""One tiny random model of each architecture in the families table."""

from __future__ import annotations

from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MOE = {"num_local_experts": 4, "sliding_window": None}
_OLD = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}

# Windows are smaller than the documents of the tests.
SPECS: dict[str, dict[str, Any]] = {
    "baichuan": {"z_loss_weight": 0, "num_key_value_heads": None},
    "bloom": {"n_head": 4, "n_layer": 2},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"sliding_window": 5, "sliding_window_pattern": 2, "logit_scale": 0.25},
    "exaone4": {"sliding_window": 5},
    "falcon": {"alibi": False, "multi_query": True, "parallel_attn": True, "head_dim": None},
    "gemma": {},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "glm4": {},
    "gpt2": _OLD,
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "llama": {},
    "mistral": {"sliding_window": 5},
    "mixtral": _MOE,
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 5},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 6, "original_max_position_embeddings": 128},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "smollm3": {"use_sliding_window": True, "sliding_window": 5},
    "stablelm": {},
    "starcoder2": {"sliding_window": 5},
    # Not in the table: their masks ignore restarting positions.
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 5},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
}


ALIBI = "baichuan alibi"
"""A family's second kind of positions, for tests of attention: also a name that these take."""


def family_config(family: str, **overrides: Any) -> Any:
    """A 2-layer config of a family with 96 vocabulary entries."""
    if family == ALIBI:
        family, overrides = "baichuan", {"alibi": True, **overrides}
    from transformers import AutoConfig

    from glasstune.models.families.native import register_native

    register_native(family)
    options = {**_COMMON, **SPECS[family], **overrides}
    if options.get("head_dim") is None:
        options.pop("head_dim", None)
    return AutoConfig.for_model(family, **options)


def family_model(family: str, **overrides: Any) -> Any:
    """A frozen model in eval mode whose every matrix matters (large random weights)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    attention = "eager" if family in ("gemma2", "gpt_oss") else None
    config = family_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)
