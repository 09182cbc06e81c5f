"""A tiny Baichuan2 checkpoint, laid out as people have it: weights, tokenizer.model, code files."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

VOCABULARY = 640
USER, ASSISTANT = 195, 196
"""Ids of the two markers: `<reserved_106>` and `<reserved_107>` in the published vocabulary."""

_TEXT = [
    "用户问一个问题，助手回答。细胞理论是生物科学的一个理论，它说明所有生物都由细胞组成。",
    "你好！请问今天的天气怎么样？我想去公园散步，但是我不知道会不会下雨。",
    "What does len return? It returns the number of items of a container.",
    "The list type has append, extend, insert, remove, pop, clear and index.",
    "def add(x, y):\n    return x + y\n\n\nfor i in range(10):\n    print(add(i, i))\n",
    "0123456789 3.14159 2024 + - * / = ( ) [ ] { } . , ; : ! ? ' \" \t",
    "  leading and   many    spaces     in a line ",
]
_WORD = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False,
         "single_word": True}  # fmt: skip
_CODE = "raise RuntimeError('code that came with the checkpoint was run')\n"
_FILES = (
    "configuration_baichuan.py", "modeling_baichuan.py", "tokenization_baichuan.py",
    "generation_utils.py", "quantizer.py",
)  # fmt: skip


@cache
def sentencepiece_model(vocabulary: int = VOCABULARY) -> bytes:
    """Trains a sentencepiece model with Baichuan2's options.

    BPE with bytes for what is rare, digits one by one, text left as it is, no space put before it.
    Symbols of the user fill up to the markers' ids, whose names are those of the published model.
    """
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT * 3),
        model_writer=made,
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        character_coverage=0.9995,
        user_defined_symbols=[_symbol(index) for index in range(3, 203)],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=3,
    )
    return made.getvalue()


def _symbol(index: int) -> str:
    return f"<reserved_{index - 89}>" if index > 89 else f"<extra_{index}>"


def baichuan_config(kind: str = "rope", **overrides: Any) -> dict[str, Any]:
    """The `config.json` of a tiny second-generation model, in the words of the published ones.

    Args:
        kind: `rope` (as the 7B model) or `alibi` (as the 13B model).
        overrides: Keys to change; None takes one out.
    """
    content: dict[str, Any] = {
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
        "tokenizer_class": "BaichuanTokenizer",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
        "intermediate_size": 128, "max_position_embeddings": 4096, "model_max_length": 4096,
        "model_type": "baichuan", "num_attention_heads": 4, "num_hidden_layers": 2,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.29.2", "use_cache": True, "vocab_size": VOCABULARY,
        "z_loss_weight": 0,
    }  # fmt: skip
    if kind == "alibi":
        # No power of two: its slopes are the harder ones, like those of 40 heads.
        content |= {"num_attention_heads": 6, "hidden_size": 192}
        del content["max_position_embeddings"]
    content |= overrides
    return {key: value for key, value in content.items() if value is not None}


def save_tokenizer(folder: Path) -> Path:
    """Writes `tokenizer.model` and its config as the published ones are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    content: dict[str, Any] = {
        "add_bos_token": False, "add_eos_token": False,
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "bos_token": {"content": "<s>", **_WORD}, "eos_token": {"content": "</s>", **_WORD},
        "pad_token": {"content": "<unk>", **_WORD}, "unk_token": {"content": "<unk>", **_WORD},
        "clean_up_tokenization_spaces": False, "model_max_length": 4096, "sp_model_kwargs": {},
        "tokenizer_class": "BaichuanTokenizer", "use_fast": False,
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", content)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    _write(folder / "special_tokens_map.json", names)
    return folder


def baichuan_model(kind: str = "rope", seed: int = 0, scale: float = 4.0, **overrides: Any) -> Any:
    """A random model in eval mode; its rows of the head have many lengths.

    Args:
        kind: As in `baichuan_config`.
        seed: Of the weights.
        scale: As in `save_tiny_model`.
        overrides: Config keys.
    """
    import torch

    from glasstune.models.families.baichuan import BaichuanConfig, BaichuanForCausalLM

    content = baichuan_config(kind, **overrides)
    torch.manual_seed(seed)
    model = BaichuanForCausalLM(BaichuanConfig.from_dict(content)).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(scale)
        model.lm_head.weight.mul_(torch.rand(len(model.lm_head.weight), 1) * 3 + 0.2)
        model.lm_head.weight.mul_(10.0)  # logits of unit rows are small otherwise
    return model


def save_baichuan(
    folder: Path,
    kind: str = "rope",
    *,
    weights: str = "bin",
    dtype: str = "bfloat16",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Writes a tiny Baichuan2 checkpoint as a user has it and returns its folder.

    Args:
        folder: Made where missing.
        kind: `rope` or `alibi`.
        weights: `bin` (as published), `safetensors`, or `none`.
        dtype: Of the stored weights.
        seed: Of the weights.
        overrides: Config keys.
    """
    import torch
    from safetensors.torch import save_file

    save_tokenizer(folder)
    _write(folder / "config.json", baichuan_config(kind, **overrides))
    generation = {
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "user_token_id": USER,
        "assistant_token_id": ASSISTANT, "max_new_tokens": 2048, "do_sample": True,
        "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05,
    }  # fmt: skip
    _write(folder / "generation_config.json", generation)
    for name in _FILES:
        (folder / name).write_text(_CODE, encoding="utf-8")
    if weights == "none":
        return folder
    model = baichuan_model(kind, seed, **overrides)
    state = {
        name: value.detach().to(getattr(torch, dtype)).contiguous()
        for name, value in model.state_dict().items()
    }
    if weights == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    if kind == "rope":  # the published files hold these tables
        for layer in range(model.config.num_hidden_layers):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            state[name] = model.model.rotary_emb.inv_freq.clone()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
