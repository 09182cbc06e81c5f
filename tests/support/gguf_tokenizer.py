"""A plain tokenizer that knows nothing but a GGUF file: what llama.cpp does, written by hand.

Added tokens are cut out first (longest first), then text is split by the rules that the name in
`tokenizer.ggml.pre` stands for in llama.cpp, then neighbours are joined: by the rank of their merge
(`gpt2`), or by the score of what they make (`llama`). Slow and short, an independent truth.
"""

from __future__ import annotations

import re as plain_re
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
UP, LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLITS = {
    "llama-bpe": [WORDS + r"|\p{N}{1,3}|" + REST],
    "dbrx": [WORDS + r"|\p{N}{1,3}|" + REST],
    "qwen2": [WORDS + r"|\p{N}|" + REST],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "tekken": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{UP}*{LOW}+|[^\r\n\p{{L}}\p{{N}}]?{UP}+{LOW}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
WHOLE_WORDS = {"llama-bpe", "tekken"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def _alphabet() -> dict[int, str]:
    """The letters that stand for bytes: printable Latin-1 as it is, the others from 256 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {value: chr(value) for value in kept}
    for value in range(256):
        if value not in letters:
            letters[value] = chr(256 + len(letters) - len(kept))
    return letters


ALPHABET = _alphabet()


class GgufTokenizer:
    """Encodes text by a GGUF file's metadata alone."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        fields = GGUFReader(path).fields
        self.meta: dict[str, Any] = {
            name.removeprefix("tokenizer.ggml."): field.contents()
            for name, field in fields.items()
            if name.startswith("tokenizer.ggml.")
        }
        self.chat_template = (
            fields["tokenizer.chat_template"].contents()
            if "tokenizer.chat_template" in fields
            else None
        )
        self.tokens: list[str] = self.meta["tokens"]
        self.types: list[int] = self.meta["token_type"]

    @cached_property
    def ids(self) -> dict[str, int]:
        assert len(set(self.tokens)) == len(self.tokens), "llama.cpp wants every text once"
        return {token: index for index, token in enumerate(self.tokens)}

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        return {tuple(m.split(" ", 1)): rank for rank, m in enumerate(self.meta["merges"])}

    @cached_property
    def cut(self) -> plain_re.Pattern[str]:
        added = [t for t, kind in zip(self.tokens, self.types, strict=True) if kind in (3, 4)]
        added.sort(key=len, reverse=True)
        return plain_re.compile(
            "|".join(f"({plain_re.escape(token)})" for token in added) or r"(?!)"
        )

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        found: list[int] = []
        if add_special and self.meta["add_bos_token"]:
            found.append(self.meta["bos_token_id"])
        at, behind_added = 0, True
        for match in [*self.cut.finditer(text), None]:
            end = len(text) if match is None else match.start()
            if end > at:
                found += self._plain(text[at:end], behind_added)
                behind_added = False
            if match is not None:
                found.append(self.ids[match.group()])
                at, behind_added = match.end(), True
        if add_special and self.meta["add_eos_token"]:
            found.append(self.meta["eos_token_id"])
        return found

    def _plain(self, text: str, behind_added: bool) -> list[int]:
        if self.meta["model"] == "llama":
            space = " " if self.meta["add_space_prefix"] and behind_added else ""
            return self._by_score((space + text).replace(" ", "▁"))
        pieces = [text]
        for pattern in SPLITS[self.meta["pre"]]:
            pieces = [part for piece in pieces for part in _split(pattern, piece)]
        ids: list[int] = []
        for piece in pieces:
            word = "".join(ALPHABET[byte] for byte in piece.encode())
            if self.meta["pre"] in WHOLE_WORDS and word in self.ids:
                ids.append(self.ids[word])
            else:
                ids += [self.ids[part] for part in self._by_rank(list(word))]
        return ids

    def _by_rank(self, parts: list[str]) -> list[str]:
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, 10**9))
            if best not in self.ranks:
                break
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
        return parts

    def _by_score(self, text: str) -> list[int]:
        parts, scores = list(text), self.meta["scores"]
        while True:
            made = [
                (-scores[self.ids[left + right]], at)
                for at, (left, right) in enumerate(pairwise(parts))
                if left + right in self.ids
            ]
            if not made:
                break
            at = min(made)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids: list[int] = []
        for part in parts:
            known = self.ids.get(part)
            ids += [known] if known is not None else [
                self.ids[f"<0x{byte:02X}>"] for byte in part.encode()
            ]  # fmt: skip
        return ids


def _split(pattern: str, text: str) -> list[str]:
    """Matches and what lies between them, each a piece."""
    pieces: list[str] = []
    at = 0
    for match in regex.finditer(pattern, text):
        if match.start() > at:
            pieces.append(text[at : match.start()])
        if match.group():
            pieces.append(match.group())
        at = match.end()
    return [*pieces, text[at:]] if at < len(text) else pieces


def mixed_strings(count: int = 200) -> list[str]:
    """Strings of many scripts, numbers, code, white space and emoji, the same at every call."""
    import random

    draw = random.Random(7)
    parts = [
        "Hello", " world", "it's", "DON'T", " we'll", "I'VE", "naïve", "café", " 3", "33", "3333",
        "1234567", " 3.14", "x=1;", "def f(a, b):\n    return a", "\n\n", "\t", "   ", "\r\n",
        " \n ", "你好，世界", "ひらがな", "한국어", "Привет", "مرحبا", "नमस्ते", "ไทย", "🚀",
        "👩\u200d👩\u200d👧", "ﬁ", "ß", "—", "…", "<html>", '{"a": [1, null]}', "a_b-c/d\\e",
        "$%^&*", "''''", "......", "!?", "#tag", "@me", "CamelCaseWord", "ALLCAPS", "snake_case",
        " a", "b ", "  two", "e\u0301", "²", "①", "٣٤", "\u00a0", "\u200b", "/usr/bin", "½", "Ω",
        "user@host.org", "http://a.b/c?d=e", "0x1F", "1e-5", "∑", "‘q’", "“q”",
    ]  # fmt: skip
    strings = ["", " ", "a", *parts]
    while len(strings) < count:
        strings.append("".join(draw.choices(parts, k=draw.randint(2, 9))))
    return strings[:count]
