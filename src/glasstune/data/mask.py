"""Rows as a training step gets them, with the state of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from glasstune.core.batch import IGNORED, MicroBatch
from glasstune.core.mask import ShownDocument, ShownRow, ShownToken, ShownTurn, State
from glasstune.data.formats import Example
from glasstune.data.prepare import PreparedData
from glasstune.data.tokenizer import pad_id
from glasstune.data.turns import examples_of, turns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELD = 8
"""Tokens that may wait for the end of a character; more are shown as they are."""


def show_rows(prepared: PreparedData, count: int) -> list[ShownRow]:
    """Returns the first rows that training sees.

    They come from the batch that a step of the first epoch gets, so this is the mask itself and
    no second opinion on it.

    Args:
        prepared: Data ready to train.
        count: How many rows (packs where rows are packed).
    """
    data, tokenizer = prepared.train, prepared.template.tokenizer
    order = data.order(prepared.seed, 0)[:count].tolist()
    batches = [data.micro_batch([row], 0, pad_id(tokenizer)) for row in order]
    documents = [document for batch in batches for document in batch.documents]
    examples = examples_of(prepared.opened, prepared.template, documents)
    return [_row(row, batch, prepared, examples) for row, batch in zip(order, batches, strict=True)]


def _row(
    number: int,
    batch: MicroBatch,
    prepared: PreparedData,
    examples: Mapping[tuple[int, str], Example],
) -> ShownRow:
    template, sources = prepared.template, prepared.sources
    tokenizer = template.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = batch.input_ids[0].tolist()
    # The target at a position is what it must predict: the label of the next one.
    labels = [IGNORED, *batch.targets[0, :-1].tolist()]
    owner = batch.document_ids[0].tolist()
    tokens: list[ShownToken] = []
    documents: list[ShownDocument] = []
    start = 0
    for index, document in enumerate(batch.documents):
        end = start + len(document)
        inside = range(start, end)
        states = [_state(ids[k], labels[k], special) for k in inside]
        texts = token_texts(tokenizer, ids[start:end])
        for k, text, state in zip(inside, texts, states, strict=True):
            other = labels[k] not in (IGNORED, ids[k])
            instead = token_texts(tokenizer, [labels[k]])[0] if other else None
            tokens.append(ShownToken(text, ids[k], state, ids[k] in special, instead))
        trained = states.count("trained")
        name = sources[document.source]
        example = examples.get((document.source, document.origin))
        turns = turns_of(template, example, document, texts, special)
        moved = tuple(ShownTurn(each.role, start + each.start, start + each.end) for each in turns)
        documents.append(ShownDocument(document.origin, name, start, end, trained, moved))
        assert set(owner[start:end]) == {index}
        start = end
    padding = [
        ShownToken(text, ids[start + k], "padding", ids[start + k] in special)
        for k, text in enumerate(token_texts(tokenizer, ids[start:]))
    ]
    return ShownRow(number, (*tokens, *padding), tuple(documents))


def _state(token: int, label: int, special: set[int]) -> State:
    if label != IGNORED:
        return "trained"
    return "special" if token in special else "context"


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Returns each token's own part of the decoded text.

    A token is decoded behind the one before it, since some tokenizers drop a leading space of a
    whole text. One that ends inside a character gets nothing, and the one that completes the
    character gets it.
    """
    texts: list[str] = []
    start, before = 0, ""  # `before` is the text of ids[start:shown]
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[start:end])
        if text.endswith("\ufffd") and end - start < _HELD and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :] if text.startswith(before) else text)
        # From here on only this token is decoded again, as the context of the next.
        start = end - 1
        before = _decode(tokenizer, ids[start:end])
        if before.endswith("\ufffd") or before.startswith("\ufffd"):
            start, before = end, ""
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
