"""The ids of prompts, mostly without tokenising them a second time.

A prompt is tokenised alone, as generation does it, and compared with how its whole conversation
starts. Tokenizers cut a text at their added tokens before anything else, so what stands before
such a token has the same ids whatever follows. A prompt that ends with `<|im_start|>assistant` and
a line break therefore shares its ids with the conversation up to that token, and the short rest is
the same for every row. Whether a tokenizer keeps to this is tried out once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from glasstune.data.places import Tokens
from glasstune.data.spans import Rendered
from glasstune.data.tokenizer import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glasstune.data.template import ChatTemplate

_SAMPLES = ("why", "Why not? 12,3 ", " a\n\nb\t", "\u4e8c\u00e9\n", "x" * 40 + " \n ")


@dataclass
class Prompts:
    """Encodes prompts for one tokenizer.

    Args:
        tokenizer: The tokenizer.
        tokens: Ids of the added tokens at which a prompt may be cut.
        pattern: Finds them.
        endings: Ids of the endings that were met.
    """

    tokenizer: PreTrainedTokenizerBase
    tokens: dict[str, int]
    pattern: re.Pattern[str]
    endings: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def of(template: ChatTemplate) -> Prompts:
        """Returns the one of a template's tokenizer."""
        return _prompts(_ById(template.tokenizer))

    def encode(self, rows: Sequence[Rendered], texts: Sequence[Tokens]) -> list[list[int]]:
        """Returns the ids of each row's prompt, as the tokenizer gives them for it alone.

        Args:
            rows: The conversations.
            texts: Their whole texts.
        """
        found = [self._shared(row, tokens) for row, tokens in zip(rows, texts, strict=True)]
        alone = [row.prompt for row, ids in zip(rows, found, strict=True) if ids is None]
        rest = iter(encode_plain(self.tokenizer, alone))
        return [next(rest) if ids is None else ids for ids in found]

    def _shared(self, row: Rendered, whole: Tokens) -> list[int] | None:
        """Returns a prompt's ids where they can be taken from the whole text's, else None."""
        if whole.places is None or not self.tokens or not row.text.startswith(row.prompt):
            return None
        at, token = self._last_token(row.prompt)
        if at <= 0:
            return None
        first = whole.places.token_at(at, at + len(token))
        if first is None or whole.ids[first] != self.tokens[token]:
            return None
        ending = row.prompt[at:]
        if ending not in self.endings:
            if len(self.endings) > 1000:  # endings that hold text: nothing to gain
                return None
            self.endings[ending] = encode_plain(self.tokenizer, [ending])[0]
        return whole.ids[:first] + self.endings[ending]

    def _last_token(self, prompt: str) -> tuple[int, str]:
        # Endings are short; a token further ahead would leave text to be tokenised anyway.
        start = max(0, len(prompt) - 200)
        matches = list(self.pattern.finditer(prompt, start))
        return (matches[-1].start(), matches[-1].group()) if matches else (-1, "")

    def holds(self) -> bool:
        """Tries whether texts before and behind each added token are tokenised on their own."""
        for token, index in self.tokens.items():
            for left in _SAMPLES:
                for right in _SAMPLES[1:]:
                    whole, before, behind = encode_plain(
                        self.tokenizer, [left + token + right, left, token + right]
                    )
                    if whole != before + behind or behind[:1] != [index]:
                        return False
        return True


class _ById:
    """A tokenizer that is equal to itself alone; tokenizers compare by content otherwise."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __hash__(self) -> int:
        return id(self.tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.tokenizer is self.tokenizer


@lru_cache(maxsize=8)
def _prompts(key: _ById) -> Prompts:
    tokenizer = key.tokenizer
    added = tokenizer.added_tokens_decoder if tokenizer.is_fast else {}
    tokens = {
        token.content: index
        for index, token in added.items()
        # One that takes blanks around it, or looks at its neighbours, is no clean cut.
        if not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        and token.special
    }
    ordered = sorted(tokens, key=len, reverse=True)
    prompts = Prompts(tokenizer, tokens, re.compile("|".join(map(re.escape, ordered)) or "(?!)"))
    if (
        not tokens
        or not Prompts(tokenizer, dict(list(tokens.items())[:20]), prompts.pattern).holds()
    ):
        prompts.tokens = {}
    return prompts
