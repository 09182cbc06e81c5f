"""Where tokens lie in their text, asked of the tokenizer's own object where there is one.

A list of every token's offsets costs a quarter of tokenising; a row needs only a few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glasstune.data.tokenizer import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = Sequence[tuple[int, int]]


class Places:
    """Character offsets of some tokens.

    Args:
        offsets: (start, end) of each token.
    """

    def __init__(self, offsets: Offsets) -> None:
        self._offsets: Offsets | None = offsets

    @property
    def offsets(self) -> Offsets:
        """(start, end) of each token; they may leave out spaces around a token."""
        assert self._offsets is not None
        return self._offsets

    def start(self, token: int) -> int:
        """Returns where a token starts."""
        return int(self.offsets[token][0])

    def first(self, at: int) -> int:
        """Returns the first token that ends behind a place, or the number of tokens."""
        found = (k for k, (_, stop) in enumerate(self.offsets) if stop > at)
        return next(found, len(self.offsets))

    def behind(self, at: int) -> int:
        """Returns the number of the token after the last one that starts before a place."""
        offsets = self.offsets
        found = (k for k in range(len(offsets) - 1, -1, -1) if offsets[k][0] < at)
        return next(found, -1) + 1

    def token_at(self, start: int, end: int) -> int | None:
        """Returns the first token behind everything before `start`, if it lies there exactly."""
        first = self.first(start)
        if first == len(self.offsets) or tuple(self.offsets[first]) != (start, end):
            return None
        return first


class EncodingPlaces(Places):
    """The same, asked of an `Encoding` of the `tokenizers` library.

    Args:
        encoding: The encoding.
        size: Its number of tokens.
    """

    def __init__(self, encoding: Any, size: int) -> None:
        self.encoding = encoding
        self.size = size
        self._offsets = None

    @property
    def offsets(self) -> Offsets:
        """(start, end) of each token."""
        if self._offsets is None:
            self._offsets = self.encoding.offsets
        return self._offsets

    def start(self, token: int) -> int:
        """Returns where a token starts."""
        found = self.encoding.token_to_chars(token)
        return int(found[0]) if found else super().start(token)

    def first(self, at: int) -> int:
        """Returns the first token that ends behind a place, or the number of tokens."""
        # None where no token covers the place: a space that belongs to none, or the text's end.
        found = self.encoding.char_to_token(at)
        return super().first(at) if found is None else int(found)

    def behind(self, at: int) -> int:
        """Returns the number of the token after the last one that starts before a place."""
        found = self.encoding.char_to_token(at - 1) if at > 0 else None
        if found is None:
            return super().behind(at)
        token = int(found) + 1
        # A character of several tokens: each of them covers it.
        while token < self.size and self.start(token) < at:
            token += 1
        return token

    def token_at(self, start: int, end: int) -> int | None:
        """Returns the first token behind everything before `start`, if it lies there exactly."""
        found = self.encoding.char_to_token(start)
        if found is None or self.encoding.token_to_chars(found) != (start, end):
            return None
        return int(found)


@dataclass(slots=True)
class Tokens:
    """A tokenised text.

    Args:
        ids: Token ids.
        places: Where they lie in the text; None where the tokenizer does not tell.
    """

    ids: list[int]
    places: Places | None


def tokenise_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Tokens]:
    """Returns the tokens of each text without any special token around it."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [Tokens(ids, None) for ids in encode_plain(tokenizer, texts)]
    found: Any = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        Tokens(ids, EncodingPlaces(encoding, len(ids)))
        for ids, encoding in zip(found["input_ids"], found.encodings, strict=True)
    ]


def quick_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]] | None:
    """Returns the ids of each text without offsets; None where only the tokenizer's call will do.

    The library's own call without offsets takes a fifth less time than the one with them, which
    transformers always makes.
    """
    from transformers import PreTrainedTokenizerFast

    backend = getattr(tokenizer, "backend_tokenizer", None)
    encode = getattr(backend, "encode_batch_fast", None)
    if encode is None or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    own = type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus
    if own or type(tokenizer).__call__ is not PreTrainedTokenizerFast.__call__:
        return None
    encode_plain(tokenizer, ["a"])  # takes back what an earlier call with truncation left behind
    return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]
