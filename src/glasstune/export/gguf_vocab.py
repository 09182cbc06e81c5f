"""The vocabulary of a GGUF file: tokens, types, scores, merges, special ids, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from glasstune.core.errors import InputError
from glasstune.export.gguf_pre import Splitting, splitting, unknown
from glasstune.generation.tokenizer_facts import TokenizerFacts

_ADDED_SCORE = -1000.0
"""Far below every piece of a text: an added token is found before the scores are asked."""
_BYTES = {f"<0x{value:02X}>" for value in range(256)}


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file.

    Args:
        splitting: Model kind and name of the splitting.
        tokens: Text of each id, as many as the embedding has rows.
        types: GGUF's type of each.
        scores: Of each (SentencePiece), else empty.
        merges: `left right` in order (BPE), else empty.
        ids: `bos`, `eos`, `unk`, `pad`, `eot` to id.
        add_bos: Whether the reader puts the begin token before a text.
        add_eos: Whether it puts the end token behind a text.
        add_space: Whether it puts a space before a text (SentencePiece).
        chat_template: Jinja text, or named texts, or None.
        notes: What a reader will do otherwise than the tokenizer.
    """

    splitting: Splitting
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space: bool = True
    chat_template: str | Mapping[str, str] | None = None
    notes: Sequence[str] = field(default_factory=list)


def gguf_vocabulary(facts: TokenizerFacts, rows: int) -> Vocabulary:
    """Brings a tokenizer into GGUF's terms.

    Args:
        facts: The tokenizer.
        rows: Rows of the embedding. Ids without a token get a name that no text holds.

    Raises:
        InputError: `unknown_tokenizer`, or `vocabulary_too_large` where a token has no row.
    """
    highest = max(facts.vocabulary.values())
    if highest >= rows:
        raise InputError(
            "vocabulary_too_large",
            f"the tokenizer has id {highest}, the embedding only {rows} rows",
            where=facts.where,
            fix="save the tokenizer that belongs to this model",
        )
    found = splitting(facts.rules, facts.where, lambda: _merges_reach_all(facts))
    tokens, types = _tokens(facts, rows, found)
    add_bos, add_eos = _around(facts)
    notes = _notes(facts, found)
    add_space, why = _space(facts, found)
    llama = found.model == "llama"
    ids = dict(facts.ids)
    if facts.begin:
        ids["bos"] = facts.begin[0]
    if facts.turn_end is not None:
        ids["eot"] = facts.turn_end
    return Vocabulary(
        splitting=found,
        tokens=tokens,
        types=types,
        scores=_scores(facts, types) if llama else (),
        merges=() if llama else [" ".join(pair) for pair in _merges(facts.rules)],
        ids=ids,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space=add_space,
        chat_template=facts.chat_template,
        notes=[*notes, *why],
    )


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Writes a vocabulary's keys."""
    writer.add_tokenizer_model(vocabulary.splitting.model)
    writer.add_tokenizer_pre(vocabulary.splitting.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.splitting.model == "gpt2":
        writer.add_token_merges(list(vocabulary.merges))
    else:
        writer.add_add_space_prefix(vocabulary.add_space)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
        "eot": writer.add_eot_token_id,
    }
    for name, index in vocabulary.ids.items():
        add[name](index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    template = vocabulary.chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)
    elif template is not None:
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in template.items()]
        )


def _tokens(facts: TokenizerFacts, rows: int, found: Splitting) -> tuple[list[str], list[int]]:
    """Returns text and type of each row."""
    spelled = {index: token for token, index in facts.vocabulary.items()}
    taken = set(spelled.values())
    tokens: list[str] = []
    types: list[int] = []
    for index in range(rows):
        text = spelled.get(index)
        kind = TokenType.NORMAL
        if index in facts.added:
            text = facts.added[index].text
            kind = TokenType.CONTROL if facts.added[index].special else TokenType.USER_DEFINED
        if text is None:
            text, kind = f"[PAD{index}]", TokenType.UNUSED
            while text in taken:  # a reader wants every text once
                text = f"[{text}]"
        elif found.model == "llama":
            if index == facts.ids.get("unk"):
                kind = TokenType.UNKNOWN
            elif text in _BYTES and kind is TokenType.NORMAL:
                kind = TokenType.BYTE
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _merges(rules: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the merges in order; older files hold them as one text with a space."""
    found: list[tuple[str, str]] = []
    for merge in rules["model"]["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        found.append((left, right))
    return found


def _scores(facts: TokenizerFacts, types: Sequence[int]) -> list[float]:
    """Returns scores that say what the merges say: a reader of GGUF has no merges to follow.

    It joins the two neighbours whose joined text has the highest score. Only the order of scores
    counts, so each piece gets the place of its merge, negative.

    Raises:
        InputError: `unknown_tokenizer`: no scores say it, since the merges of one piece lie apart,
            or a pair that could be joined is not among them.
    """
    merges = _merges(facts.rules)
    rank: dict[str, int] = {}
    before = ""
    for left, right in merges:
        made = left + right
        if made != before and made in rank:
            raise unknown(facts.where, f"its merges to {made} do not follow each other")
        rank.setdefault(made, len(rank))
        before = made
    _check_all_joined(facts, set(merges))
    spelled = {index: token for token, index in facts.vocabulary.items()}
    scores = []
    for index, kind in enumerate(types):
        if kind in (int(TokenType.NORMAL), int(TokenType.UNUSED)):
            scores.append(-float(rank.get(spelled.get(index, ""), len(rank) + index)))
        else:
            scores.append(0.0 if kind == int(TokenType.BYTE) else _ADDED_SCORE)
    return scores


def _check_all_joined(facts: TokenizerFacts, merges: set[tuple[str, str]]) -> None:
    """Refuses a tokenizer that leaves two pieces apart whose joined text is a piece."""
    vocabulary = facts.vocabulary
    skipped = {token.text for token in facts.added.values()}
    for token in vocabulary:
        if token in skipped or token in _BYTES:
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            pair = left in vocabulary and right in vocabulary
            if pair and (left, right) not in merges and not {left, right} & skipped:
                raise unknown(facts.where, f"it never joins {left} and {right} to {token}")


def _merges_reach_all(facts: TokenizerFacts) -> bool:
    """Whether the merges make every token of the vocabulary from its bytes."""
    from tokenizers import Tokenizer

    rules = json.loads(json.dumps(facts.rules))
    rules["model"]["ignore_merges"] = False
    model = Tokenizer.from_str(json.dumps(rules)).model
    added = {token.text for token in facts.added.values()}
    return all(len(model.tokenize(token)) == 1 for token in facts.vocabulary if token not in added)


def _around(facts: TokenizerFacts) -> tuple[bool, bool]:
    """Returns whether a begin and an end token go around a text.

    Raises:
        InputError: `unknown_tokenizer`: something else goes around it.
    """
    if len(facts.begin) > 1 or (facts.end and facts.end != (facts.ids.get("eos"),)):
        raise unknown(facts.where, f"it puts ids {facts.begin} and {facts.end} around a text")
    return bool(facts.begin), bool(facts.end)


def _space(facts: TokenizerFacts, found: Splitting) -> tuple[bool, list[str]]:
    """Returns whether the reader puts a space before a text, and a note where that is a choice.

    llama.cpp puts it before a text and behind every added token; transformers today only before
    a text. A chat that opens with an added token therefore has no such space at all.
    """
    own = ["GGUF: llama.cpp puts a space also before a text that starts with one"]
    if found.prefix != "first":
        return found.prefix == "all", own if found.joins else []
    opens = False
    if facts.render is not None:
        text = facts.render([{"role": "user", "content": "a"}])
        opens = text.startswith(tuple(token.text for token in facts.added.values()))
    if opens:
        return False, [
            "GGUF: no space is put before a text, as in the chats that this model was tuned on; "
            "a text without the chat template lacks the space that the tokenizer puts there"
        ]
    return True, [
        *own,
        "GGUF: llama.cpp puts a space also behind each added token, the tokenizer does not",
    ]


def _notes(facts: TokenizerFacts, found: Splitting) -> list[str]:
    notes = []
    if found.composes:
        notes.append("GGUF: llama.cpp does not bring text to NFC, as the tokenizer does")
    if found.pre == "tekken":
        notes.append("GGUF: llama.cpp splits words with combining marks (Hindi, Thai) otherwise")
    strips = [token.text for token in facts.added.values() if token.strips]
    if strips:
        shown = ", ".join(strips[:3]) + (" ..." if len(strips) > 3 else "")
        notes.append(f"GGUF: llama.cpp keeps the white space beside {shown}")
    if facts.template_kwargs:
        given = ", ".join(facts.template_kwargs)
        notes.append(f"GGUF: the file cannot carry chat_template_kwargs ({given})")
    return notes
