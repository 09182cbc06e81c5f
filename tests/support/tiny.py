"""Tiny random models and a tokenizer, made in seconds; every room's tests may use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TEXT = [
    "What does len return? It returns the number of items of a container.",
    "The list type has append, extend, insert, remove, pop, clear and index.",
    "A dictionary maps keys to values; str and int are hashable, list is not.",
    "用户问一个问题，助手回答。细胞理论是生物科学的一个理论。",
    "0123456789 + - * / = ( ) [ ] { } . , ; : ! ? ' \" \n\t",
]


def tiny_tokenizer(chat_template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of about 400 entries with ChatML's marks; pad = eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """A 2-layer config of a family with 512 vocabulary entries."""
    from transformers import AutoConfig

    options: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    if family == "bloom":
        options = {
            "vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4,
            "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
        }  # fmt: skip
    if family == "gpt2":
        options = {
            "vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512,
            "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
        }  # fmt: skip
    options.update(overrides)
    return AutoConfig.for_model(family, **options)


def save_tiny_model(
    folder: Path, family: str = "llama", seed: int = 0, scale: float = 4.0, **overrides: Any
) -> Path:
    """Writes a random model with its tokenizer to a folder and returns it.

    Args:
        folder: Made where missing.
        family: `model_type`.
        seed: Of the weights.
        scale: Weights are multiplied by it: transformers' init of 0.02 gives a model whose output
            hardly depends on its input, so that a test would pass on anything.
        overrides: Config keys.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(scale)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
