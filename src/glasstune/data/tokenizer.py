"""Tokenizers: loading, with its failures in plain words, and the few facts that encoders need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    folder_or_hub_id: str, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder, a hub id or a GGUF file.

    Args:
        folder_or_hub_id: Where its files are.
        trust_remote_code: Whether Python code that comes with it may run.

    Raises:
        InputError: It cannot be had; says what is missing and what to do.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    path = Path(folder_or_hub_id)
    name = folder_or_hub_id
    if path.is_file() and path.suffix.lower() == ".gguf":
        name, options["gguf_file"] = str(path.parent), path.name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        raise _explain(error, folder_or_hub_id) from error
    return tokenizer


def _explain(error: Exception, name: str) -> InputError:
    text = str(error)
    first = (text.strip().splitlines() or [type(error).__name__])[0]
    if "trust_remote_code" in text:
        return InputError(
            "remote_code",
            "this tokenizer is Python code that comes with the checkpoint",
            where=name,
            fix="read the code, then set model.trust_remote_code: true",
        )
    if Path(name).is_dir():
        held = ", ".join(sorted(entry.name for entry in Path(name).iterdir())[:12]) or "nothing"
        return InputError(
            "no_tokenizer",
            f"no tokenizer can be loaded from this folder: {first}",
            where=name,
            fix="it needs tokenizer.json (or tokenizer.model) and tokenizer_config.json; it holds "
            f"{held}",
        )
    if "gated" in text or "401" in text or "403" in text:
        return InputError(
            "hub_forbidden",
            "the hub refuses this tokenizer: it is gated or private",
            where=name,
            fix=f"accept the licence at https://huggingface.co/{name} and log in "
            "(`hf auth login` or HF_TOKEN)",
        )
    return InputError(
        "no_tokenizer",
        f"the tokenizer cannot be loaded: {first}",
        where=name,
        fix="check the name; without a network give a local folder, or set HF_ENDPOINT to a mirror",
    )


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that the tokenizer itself puts before a text (its BOS, or none)."""
    probe: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    for at in range(len(probe) - len(plain) + 1):
        if probe[at : at + len(plain)] == plain:
            return probe[:at]
    return []


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns an id for padding; padding is masked by position, so any id serves.

    The pad token where there is one, else the end token, else 0: no vocabulary grows for it.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the id of the end token, or None."""
    found = tokenizer.eos_token_id
    return found if isinstance(found, int) else None


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text without any special token around it."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return found


def fewest_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Returns a number of tokens that a text certainly has, without tokenising it.

    Only byte-level and byte-fallback BPE give such a bound, since no token of theirs stands for
    more characters than it is long (a factor of four allows for normalisation). Others give 0.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = getattr(backend, "model", None)
    bytewise = "ByteLevel" in str(getattr(backend, "pre_tokenizer", "")) or getattr(
        model, "byte_fallback", False
    )
    if type(model).__name__ != "BPE" or not bytewise:
        return 0
    longest = max(len(token) for token in tokenizer.get_vocab())
    return len(text.strip()) // (4 * longest)


def known_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the text of all added and special tokens."""
    return sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - {""})


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the tokens that may close a turn: all but the begin token."""
    begin = tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else None
    return [token for token in known_tokens(tokenizer) if token != begin]
