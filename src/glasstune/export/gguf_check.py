"""What has no GGUF form, found before a merge that would only then be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glasstune.export.gguf_model import architecture
from glasstune.export.gguf_vocab import gguf_vocabulary
from glasstune.generation.tokenizer_facts import tokenizer_facts


def check_gguf_form(config: Any, tokenizer_folder: Path, where: str) -> None:
    """Refuses a model that `write_gguf` would refuse, from config and tokenizer alone.

    Args:
        config: Of the base; its vocabulary may still grow by the adapter's tokens.
        tokenizer_folder: Where the output's tokenizer will come from.
        where: The base, for the message.

    Raises:
        InputError: The family, a setting or the tokenizer has no GGUF form.
    """
    architecture(config, where)
    facts = tokenizer_facts(tokenizer_folder)
    gguf_vocabulary(facts, max(int(config.vocab_size), 1 + max(facts.vocabulary.values())))
