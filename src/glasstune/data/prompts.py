"""The ids of prompts, mostly without tokenising them a second time.

A prompt is tokenised alone, as generation does it, and compared with how its whole conversation
starts. Tokenizers cut a text at their added tokens before anything else, so what stands before
such a token has the same ids whatever follows. A prompt that ends with `<|im_start|>assistant` and
a line break therefore shares its ids with the conversation up to that token, and the short rest is
the same for every row. Whether a tokenizer keeps to this is tried out once.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from glasstune.data.places import Tokens
from glasstune.data.spans import Rendered
from glasstune.data.tokenizer import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glasstune.data.template import ChatTemplate

_NEAR = 200
"""Characters between the last added token of a prompt and its end."""
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
    _known: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self._known = frozenset(self.tokens.values())

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
        ending = self._ending(row.prompt[at:])
        return None if ending is None else whole.ids[:first] + ending

    def _ending(self, text: str) -> list[int] | None:
        """Returns the ids of a short text that starts with a token, kept for the next row."""
        if text not in self.endings:
            if len(self.endings) > 1000:  # endings that hold text: nothing to gain
                return None
            self.endings[text] = encode_plain(self.tokenizer, [text])[0]
        return self.endings[text]

    def quick(self, row: Rendered, ids: list[int]) -> list[tuple[int, int]] | None:
        """Finds the tokens of a row's spans without any offsets.

        Args:
            row: A conversation.
            ids: Of its whole text.

        Returns:
            Per span its first token and the one behind its last, where each span starts behind a
            whole number of tokens, the last where its prompt's ids end, and ends with an added
            token or the text. None if that cannot be told from the ids alone.
        """
        if not row.text.startswith(row.prompt) or len(row.prompt) != row.spans[-1][0]:
            return None
        matches = list(self.pattern.finditer(row.text))
        known = self._known
        places = [place for place, index in enumerate(ids) if index in known]
        # One id for each token in the text, in order: then the n-th of both are the same.
        if [ids[place] for place in places] != [self.tokens[match[0]] for match in matches]:
            return None
        starts, ends = [match.start() for match in matches], [match.end() for match in matches]
        spans: list[tuple[int, int]] = []
        for start, end in row.spans:
            last = bisect_right(ends, start) - 1
            if last < 0 or start - starts[last] > _NEAR:
                return None
            ending = self._ending(row.text[starts[last] : start])
            if ending is None or self.tokenizer.unk_token_id in ending:
                return None
            first = places[last] + len(ending)
            if ids[places[last] : first] != ending:
                return None
            if end == len(row.text):
                spans.append((first, len(ids)))
                continue
            closing = bisect_left(ends, end)
            if closing == len(ends) or ends[closing] != end:
                return None
            spans.append((first, max(first, places[closing] + 1)))
        return spans

    def _last_token(self, prompt: str) -> tuple[int, str]:
        # Endings are short; a token further ahead would leave text to be tokenised anyway.
        start = max(0, len(prompt) - _NEAR)
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
    """A tokenizer that is equal to itself alone, until tokens are added to it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.size = len(tokenizer)

    def __hash__(self) -> int:
        return hash((id(self.tokenizer), self.size))

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _ById) and other.tokenizer is self.tokenizer
        return same and other.size == self.size  # type: ignore[attr-defined]


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
    few = dict(list(tokens.items())[:20])
    if not few or not Prompts(tokenizer, few, _any_of(few)).holds():
        tokens = {}
    return Prompts(tokenizer, tokens, _any_of(tokens))


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")
