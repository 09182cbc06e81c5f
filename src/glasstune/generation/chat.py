"""Conversations: what is sent at each turn, and the answer as it comes.

A turn is one call of `generate`, so its key-value cache lives for that turn. The whole history is
encoded anew each time: the ids of a conversation are those that training would have made of it,
and templates may write earlier turns otherwise than the last (Qwen 3 drops their thoughts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from glasstune.core.errors import InputError
from glasstune.generation.generate import generate_ids

Message = dict[str, Any]
Encode = Callable[[list[Message]], list[int]]


@dataclass
class Conversation:
    """Messages of one conversation, and how many of them the model can see.

    Args:
        encode: Gives the ids of messages up to where the answer starts.
        max_positions: Longest row that the model can place; None = no limit.
        reserve: Tokens that are kept free for an answer, where that is possible.
        keeps_history: Whether earlier turns are sent; a model without a template takes one text.
    """

    encode: Encode
    max_positions: int | None = None
    reserve: int = 256
    keeps_history: bool = True
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self, text: str | None = None) -> list[Message]:
        """Returns the whole conversation, with a new question at its end where one is given."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        new = [] if text is None else [{"role": "user", "content": text}]
        turns = self.turns if self.keeps_history or text is None else []
        return [*system, *turns, *new]

    def prompt(self, text: str) -> tuple[list[int], int]:
        """Encodes the conversation with a new question.

        Where it would leave too little room for an answer, the oldest questions go, each with its
        answer, for good.

        Returns:
            The ids, and how many questions went.

        Raises:
            InputError: The template refuses the conversation, or the question alone is too long.
        """
        kept = list(self.turns)
        dropped = 0
        ids = self.encode(self.messages(text))
        limit = self.max_positions
        room = None if limit is None else limit - min(self.reserve, limit // 2)
        while room is not None and len(ids) > room and self.turns and self.keeps_history:
            after = [at for at, turn in enumerate(self.turns) if turn["role"] == "user" and at > 0]
            del self.turns[: after[0] if after else len(self.turns)]
            dropped += 1
            ids = self.encode(self.messages(text))
        if limit is not None and len(ids) >= limit:
            self.turns = kept
            raise InputError(
                "prompt_too_long",
                f"the question alone has {len(ids):,} tokens, the model can place {limit:,}",
                fix="shorten it",
            )
        return ids, dropped

    def add(self, question: str, answer: str) -> None:
        """Appends a question and its answer."""
        self.turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]


class TextStream:
    """Turns token ids into text piece by piece; the pieces join to the whole answer's text.

    A letter may be spread over tokens, so an unfinished one is held back; so is white space at
    the end, which an answer's text does not have.

    Args:
        decode: Gives the text of ids.
        write: Takes each piece.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], None]):
        self._decode, self._write = decode, write
        self.ids: list[int] = []
        self.shown = ""

    def add(self, token: int) -> None:
        """Takes the next id and writes what has become certain."""
        self.ids.append(token)
        text = self.text()
        if not text.endswith("\ufffd"):
            self._show(text)

    def finish(self) -> str:
        """Writes what was held back; returns the whole text."""
        text = self.text()
        self._show(text)
        return text

    def text(self) -> str:
        """Returns the text of all ids so far."""
        return self._decode(self.ids).strip()

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and len(text) > len(self.shown):
            self._write(text[len(self.shown) :])
            self.shown = text


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        text: Without end token.
        tokens: How many it has.
        ended: `end` (a stop token), `length`, or `stopped` by the user.
    """

    text: str
    tokens: int
    ended: str


class _Stopped(Exception):
    """The user wants no more of this answer."""


def stream_answer(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    stops: Sequence[int],
    write: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
    max_new_tokens: int = 512,
    **options: Any,
) -> Answer:
    """Answers one prompt and writes the answer's text as it comes.

    Args:
        model: A causal language model.
        tokenizer: Decodes.
        ids: The prompt.
        stops: Ids that end the answer.
        write: Takes pieces of text.
        stopped: Asked after each token; True ends the answer there.
        max_new_tokens: Longest answer.
        **options: Of `generate_ids`.

    Raises:
        InputError: As `generate_ids`.
    """
    stream = TextStream(
        lambda tokens: str(
            tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ),
        write,
    )

    def take(index: int, token: int) -> None:
        stream.add(token)
        if stopped():
            raise _Stopped

    ended = "end"
    limit = max_new_tokens
    positions = options.get("max_positions")
    if positions is not None:
        limit = min(limit, positions - len(ids))
    try:
        generate_ids(
            model, [list(ids)], stops=stops, max_new_tokens=max_new_tokens, on_token=take, **options
        )
    except _Stopped:
        ended = "stopped"
    else:
        if len(stream.ids) >= limit:
            ended = "length"
    return Answer(stream.finish(), len(stream.ids), ended)


def trains_biases(model: Any) -> bool:
    """Whether an adapter holds biases of the base, which switching it off would leave in place."""
    configs = getattr(model, "peft_config", {}).values()
    return any(getattr(config, "bias", "none") != "none" for config in configs)


@contextmanager
def adapter_off(model: Any, off: bool = True) -> Iterator[None]:
    """The base alone inside, without loading it again.

    Args:
        model: A PEFT model.
        off: False changes nothing.

    Raises:
        InputError: `adapter_biases`: the adapter changed biases of the base in place.
    """
    if off and trains_biases(model):
        raise InputError(
            "adapter_biases",
            "this adapter trains biases of the base, so it cannot be switched off in memory",
            fix="open the base alone with --no-adapter",
        )
    with model.disable_adapter() if off else nullcontext():
        yield
