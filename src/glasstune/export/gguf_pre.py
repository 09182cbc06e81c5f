"""The name of a tokenizer's text splitting in GGUF (`tokenizer.ggml.pre`), by table.

llama.cpp has each splitting in code and picks it by name, so the name must be right: a wrong one
gives other ids and no error. It is found from what the tokenizer does, not from what it is called:
the rules of `tokenizer.json` are compared with those that each name stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from glasstune.core.errors import InputError

Json = Mapping[str, Any]

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Known:
    """One splitting that llama.cpp has.

    Args:
        name: In `tokenizer.ggml.pre`.
        steps: What the tokenizer does before its merges, see `_step`.
        whole_words: Whether llama.cpp takes a word that is in the vocabulary whole, whatever the
            merges say.
    """

    name: str
    steps: tuple[str, ...]
    whole_words: bool = False


KNOWN = (
    Known("llama-bpe", (f"split {LLAMA3}", "bytes"), whole_words=True),
    Known("dbrx", (f"split {LLAMA3}", "bytes")),
    Known("qwen2", (f"split {QWEN2}", "bytes")),
    Known("tekken", (f"split {TEKKEN}", "bytes"), whole_words=True),
    Known("smollm", ("digits", "words and bytes")),
    Known("gpt-2", ("words and bytes",)),
)
"""Tried in this order. Llama 3, Qwen 2 and 2.5, Mistral Nemo, SmolLM, GPT-2 write these rules."""


@dataclass(frozen=True)
class Splitting:
    """How a tokenizer splits text, in GGUF's terms.

    Args:
        model: `gpt2` (merges over bytes) or `llama` (SentencePiece: scores, spaces as letters).
        pre: Name of the splitting.
        prefix: Where a space is put before a text (`llama`): before all, before the first piece
            only, or nowhere.
        composes: Whether text is brought to NFC first, which llama.cpp does not do.
        joins: Whether no space is put before a text that starts with one, as llama.cpp does.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    prefix: Literal["all", "first", "never"] = "never"
    composes: bool = False
    joins: bool = False


def splitting(rules: Json, where: str, merges_reach_all: Callable[[], bool]) -> Splitting:
    """Finds the GGUF name of a tokenizer's splitting.

    Args:
        rules: The object of `tokenizer.json`.
        where: For the message.
        merges_reach_all: Whether every token is made from its bytes by the merges; asked where
            tokenizer and llama.cpp differ in taking known words whole.

    Raises:
        InputError: `unknown_tokenizer`: llama.cpp has no splitting of this kind.
    """
    model = rules["model"]
    if model.get("type") != "BPE":
        raise unknown(where, f"its model is {model.get('type')}, not BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise unknown(where, f"its model has {key} {model[key]!r}")
    steps = tuple(_steps(rules.get("pre_tokenizer")))
    normal = tuple(_normal(rules.get("normalizer")))
    if model.get("byte_fallback"):
        return _sentencepiece(steps, normal, where)
    if normal not in ((), ("nfc",)):
        raise unknown(where, f"it normalises text: {', '.join(normal)}")
    whole = bool(model.get("ignore_merges"))
    same = [known for known in KNOWN if known.steps == steps]
    for known in same:
        if known.whole_words == whole:
            return Splitting("gpt2", known.name, composes=bool(normal))
    if same and merges_reach_all():
        return Splitting("gpt2", same[0].name, composes=bool(normal))
    raise unknown(where, f"it splits text by: {' · '.join(steps) or 'nothing'}")


def _sentencepiece(steps: tuple[str, ...], normal: tuple[str, ...], where: str) -> Splitting:
    """SentencePiece as transformers writes it: today's form, and that of older files."""
    if normal == () and len(steps) == 1 and steps[0].startswith("metaspace "):
        scheme = steps[0].removeprefix("metaspace ")
        prefix: Literal["all", "first", "never"] = (
            "all" if scheme == "always" else "first" if scheme == "first" else "never"
        )
        return Splitting("llama", "default", prefix, joins=prefix != "never")
    if steps == () and normal in (("prepend", "spaces"), ("spaces",)):
        return Splitting("llama", "default", "all" if len(normal) == 2 else "never")
    raise unknown(where, f"it splits text by: {' · '.join((*normal, *steps)) or 'nothing'}")


def unknown(where: str, what: str) -> InputError:
    """Returns the error for a tokenizer that GGUF cannot describe."""
    names = ", ".join(known.name for known in KNOWN)
    return InputError(
        "unknown_tokenizer",
        f"llama.cpp would tokenise otherwise, so no GGUF is written: {what}",
        where=where,
        fix=f"leave --gguf out; known are SentencePiece BPE (Llama 2, Mistral) and {names}",
    )


def _parts(rule: Json | None, key: str) -> Iterator[Json]:
    if rule is None:
        return
    if rule["type"] == "Sequence":
        for part in rule[key]:
            yield from _parts(part, key)
    else:
        yield rule


def _steps(rule: Json | None) -> Iterator[str]:
    for part in _parts(rule, "pretokenizers"):
        yield _step(part)


def _step(part: Json) -> str:
    """Returns a rule in a word; a rule that is none of the known comes back as it is."""
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "words and bytes" if part.get("use_regex", True) else "bytes"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Metaspace" and part.get("replacement") == "▁" and not part.get("split", True):
        return f"metaspace {part.get('prepend_scheme', 'always')}"
    pattern = part.get("pattern")
    if kind == "Split" and isinstance(pattern, Mapping) and "Regex" in pattern:
        how = (part.get("behavior"), bool(part.get("invert")))
        # Every text matches whole, so cutting matches out of the rest leaves the same pieces.
        if how in (("Isolated", False), ("Removed", True)):
            return f"split {pattern['Regex']}"
    return str(dict(part))


def _normal(rule: Json | None) -> Iterator[str]:
    for part in _parts(rule, "normalizers"):
        kind = part["type"]
        if kind == "NFC":
            yield "nfc"
        elif kind == "Prepend" and part.get("prepend") == "▁":
            yield "prepend"
        elif (
            kind == "Replace" and part.get("content") == "▁" and part["pattern"] == {"String": " "}
        ):
            yield "spaces"
        else:
            yield str(dict(part))
