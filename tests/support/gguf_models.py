"""Tiny models and tokenizers of every kind that GGUF export knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import CHATML, TEXT, tiny_config

SCRIPTS = [
    *TEXT,
    "Hello world, it's me. We'll see 123 4567 and 3.14; café naïve. DON'T PANIC!",
    "def f(a, b):\n    return a + b\n\n\t# done\r\n",
    "Привет мир, こんにちは, 안녕하세요, नमस्ते, مرحبا 🚀🚀 … — “q”",
] * 4


def half_exact_model(folder: Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """Writes a random fp32 model whose weights float16 holds exactly; returns it.

    Matrices are large enough that the output depends on the input, norms and biases are no ones
    and zeros, so that a tensor that is lost or swapped shows.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.mul_(4.0)
            else:
                value.copy_(torch.randn_like(value) * 0.3 + ("norm" in name))
            value.copy_(value.half().float())
    model.save_pretrained(folder)
    return model


def bpe_tokenizer(pre: str, *, ignore_merges: bool | None = None, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer with the splitting that llama.cpp calls `pre`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tekken = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {
        "llama-bpe": words + r"|\p{N}{1,3}|" + rest,
        "dbrx": words + r"|\p{N}{1,3}|" + rest,
        "qwen2": words + r"|\p{N}|" + rest,
        "tekken": tekken,
    }.get(pre)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    if pre == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    raw = Tokenizer(models.BPE(ignore_merges=bool(ignore_merges)))
    raw.pre_tokenizer = pre_tokenizers.Sequence([*first, letters]) if first else letters
    raw.normalizer = normalizers.NFC() if pre == "qwen2" else None
    raw.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(
        SCRIPTS,
        trainers.BpeTrainer(
            vocab_size=480,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        raw.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|begin|>", eos_token="<|im_end|>"
    )
    tokenizer.add_tokens(["<think>", "<tool call>"])
    tokenizer.chat_template = CHATML
    return tokenizer


def sentencepiece_tokenizer(folder: Path, legacy: bool = False) -> Any:
    """A Llama 2 tokenizer trained by SentencePiece itself, as transformers converts it."""
    import sentencepiece
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n".join(SCRIPTS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=600, byte_fallback=True, character_coverage=0.98, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy})
    )
    (folder / "text.txt").unlink()
    return LlamaTokenizer.from_pretrained(folder)
