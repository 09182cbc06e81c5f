"""Baichuan2's published fine-tuning rule: ids and labels turn by turn, no template.

For each turn, with `value` tokenised alone and without special tokens:

- a human turn adds the user marker and the text; the marker is labelled with the end token (the
  answer before it must end there), the text is not trained;
- any other turn adds the assistant marker, not trained, and the text, trained;
- the end token closes ids and labels; both are cut at the maximal length.

The published code then pads to that length with labels of -100, which no loss sees; here rows
keep their own length. Source: `fine-tune/fine-tune.py` of github.com/baichuan-inc/Baichuan2.
A system turn, which the rule does not know, is context at the start, as in that model's own
generation code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from glasstune.core.batch import IGNORED
from glasstune.core.errors import InputError
from glasstune.data.errors import refuse
from glasstune.data.roles import Message
from glasstune.data.tokenizer import encode_plain, end_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MARKERS = {"user": 195, "assistant": 196}


def marker_ids(markers: Mapping[str, int] | None, vocabulary: int) -> dict[str, int]:
    """Checks the marker ids.

    Raises:
        InputError: A marker is missing or no id of the vocabulary.
    """
    found = dict(DEFAULT_MARKERS if markers is None else markers)
    for name in DEFAULT_MARKERS:
        if name not in found or not 0 <= found[name] < vocabulary:
            raise InputError(
                "bad_marker",
                f"{name}: {found.get(name)} is no token id (0 to {vocabulary - 1})",
                where="data.markers",
                fix="give the ids that the model was trained with: {user: 195, assistant: 196}",
            )
    return found


def baichuan2_encode(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    markers: Mapping[str, int],
) -> list[tuple[list[int], list[int]]]:
    """Encodes conversations by the published rule, uncut.

    Args:
        tokenizer: Gives the ids of each text and the end token.
        conversations: Turns in the roles system, user and assistant.
        markers: Ids that open a user's and an assistant's turn.

    Returns:
        Per conversation its ids and labels.

    Raises:
        InputError: The tokenizer has no end token.
    """
    end = _end(tokenizer)
    texts = [message["content"] for messages in conversations for message in messages]
    encoded = iter(encode_plain(tokenizer, texts))
    rows: list[tuple[list[int], list[int]]] = []
    for messages in conversations:
        ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            value = next(encoded)
            if message["role"] == "user":
                ids += [markers["user"], *value]
                labels += [end, *[IGNORED] * len(value)]
            elif message["role"] == "assistant":
                ids += [markers["assistant"], *value]
                labels += [IGNORED, *value]
            else:
                ids += value
                labels += [IGNORED] * len(value)
        rows.append(([*ids, end], [*labels, end]))
    return rows


def check_baichuan2(messages: Sequence[Message]) -> None:
    """Checks that the rule has a place for each turn.

    Raises:
        RowError: A turn calls a tool or holds its result.
    """
    for turn, message in enumerate(messages):
        if message["role"] == "tool" or message.get("tool_calls"):
            refuse("template_hides_tool_call", f"turn {turn}: the baichuan2 rule knows no tools")


def baichuan2_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], markers: Mapping[str, int]
) -> list[int]:
    """Returns the ids that precede the assistant's next text.

    Raises:
        RowError: A turn calls a tool or holds its result.
    """
    check_baichuan2(messages)
    ids, _ = baichuan2_encode(tokenizer, [messages], markers)[0]
    return [*ids[:-1], markers["assistant"]]


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    end = end_id(tokenizer)
    if end is None:
        raise InputError(
            "no_end_token",
            "the tokenizer has no end token, which the baichuan2 rule needs",
            where="tokenizer",
            fix="set eos_token in its tokenizer_config.json",
        )
    return end
