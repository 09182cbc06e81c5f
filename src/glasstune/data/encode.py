"""Examples to ids and labels, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glasstune.core.batch import IGNORED
from glasstune.data.baichuan2 import baichuan2_encode, check_baichuan2
from glasstune.data.errors import RowError, refuse
from glasstune.data.formats import Example
from glasstune.data.places import Places, Tokens, quick_ids, tokenise_texts
from glasstune.data.prompts import Prompts
from glasstune.data.roles import Message
from glasstune.data.spans import Rendered, Tools
from glasstune.data.template import ChatTemplate, TrainOn, marked_spans
from glasstune.data.tokenizer import begin_ids, encode_plain, end_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Encoded:
    """One encoded row.

    Args:
        ids: Token ids.
        labels: Per token the id trained at it, or -100.
        drifted: Whether the ids before the last answer are not the ids that a prompt for it has,
            or a turn in the middle was opened otherwise than a prompt would open it.
        split: Whether the last answer was tokenised apart, as the tokenizer would have joined it
            with the end of its prompt.
        silent_tools: Whether the row lists tools that the template does not show.
    """

    ids: list[int]
    labels: list[int]
    drifted: bool = False
    split: bool = False
    silent_tools: bool = False


def encode_examples(
    template: ChatTemplate, examples: Sequence[Example], train_on: TrainOn
) -> list[Encoded | RowError]:
    """Encodes examples of any kind, uncut, in order.

    - text: begin token as the tokenizer sets it, text, end token; all trained.
    - pair, where the template is `none`: prompt and completion are tokenised apart and joined,
      so that a prompt has the same ids in training and in generation; completion and end token
      are trained. With a template a pair is a question and its answer.
    - chat: by the template.

    Returns:
        Per example its tokens, or why it has none.
    """
    found: list[Encoded | RowError | None] = [None] * len(examples)
    groups: dict[str, list[int]] = {"text": [], "pair": [], "chat": []}
    for number, example in enumerate(examples):
        plain = example.kind == "pair" and template.kind == "none"
        groups["pair" if plain else "text" if example.kind == "text" else "chat"].append(number)
    encoders: dict[str, Any] = {"text": _texts, "pair": _pairs, "chat": _chats}
    for name, numbers in groups.items():
        if not numbers:
            continue
        results = encoders[name](template, [examples[number] for number in numbers], train_on)
        for number, result in zip(numbers, results, strict=True):
            found[number] = result
    return [item for item in found if item is not None]


def _texts(
    template: ChatTemplate, examples: Sequence[Example], train_on: TrainOn
) -> list[Encoded | RowError]:
    tokenizer = template.tokenizer
    begin = begin_ids(tokenizer)
    rows: list[Encoded | RowError] = []
    for ids in encode_plain(tokenizer, [example.text for example in examples]):
        whole = _opened(begin, ids) + _ending(tokenizer, ids)
        rows.append(Encoded(whole, list(whole)))
    return rows


def _opened(begin: list[int], ids: list[int]) -> list[int]:
    """Puts the begin tokens before a text that does not have them yet."""
    return ids if begin and ids[: len(begin)] == begin else begin + ids


def _ending(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Returns the end token, unless the text closes with it or there is none."""
    end = end_id(tokenizer)
    return [] if end is None or (len(ids) > 0 and ids[-1] == end) else [end]


def _pairs(
    template: ChatTemplate, examples: Sequence[Example], train_on: TrainOn
) -> list[Encoded | RowError]:
    tokenizer = template.tokenizer
    begin = begin_ids(tokenizer)
    prompts = encode_plain(tokenizer, [example.prompt for example in examples])
    completions = encode_plain(tokenizer, [example.completion for example in examples])
    rows: list[Encoded | RowError] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        context = _opened(begin, prompt)
        answer = completion + _ending(tokenizer, completion)
        kept = context if train_on == "all" else [IGNORED] * len(context)
        rows.append(Encoded(context + answer, kept + answer))
    return rows


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    tools: Tools = None,
) -> list[int]:
    """Returns the ids after which the model answers: those that training used for the prompt.

    Args:
        tokenizer: The tokenizer.
        template: The run's template.
        prompt: A user's text, or a conversation that ends with the user's or a tool's turn. On a
            base model without a template, the text to go on with.
        system: System text put first.
        tools: JSON schemas of functions.

    Raises:
        RowError: The template cannot render it.
    """
    if isinstance(prompt, str) and template.kind == "none":
        text = prompt if system is None else f"{system}\n\n{prompt}"
        return _opened(begin_ids(tokenizer), encode_plain(tokenizer, [text])[0])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return template.render_prompt(messages, tools)


def _chats(
    template: ChatTemplate, examples: Sequence[Example], train_on: TrainOn
) -> list[Encoded | RowError]:
    if template.kind == "none":
        raise ValueError("a conversation needs a chat template")
    if template.kind == "baichuan2":
        return _baichuan2(template, examples, train_on)
    rendered = [_rendered(template, example) for example in examples]
    good = [row for row in rendered if isinstance(row, Rendered)]
    labelled = iter(_labelled(template, good, train_on))
    rows: list[Encoded | RowError] = []
    for example, row in zip(examples, rendered, strict=True):
        found = row if isinstance(row, RowError) else next(labelled)
        if isinstance(found, Encoded):
            found.silent_tools = bool(example.tools) and not template.traits.renders_tools
        rows.append(found)
    return rows


def _labelled(
    template: ChatTemplate, rows: Sequence[Rendered], train_on: TrainOn
) -> list[Encoded | RowError]:
    """Tokenises rendered conversations and labels them."""
    tokenizer, prompts = template.tokenizer, Prompts.of(template)
    found: list[Encoded | RowError | None] = [None] * len(rows)
    ids = quick_ids(tokenizer, [row.text for row in rows]) if prompts.tokens and rows else None
    for number, own in enumerate(ids or ()):
        spans = prompts.quick(rows[number], own)
        if spans is not None:
            found[number] = _encoded(template, rows[number], own, spans, train_on)
    numbers = [number for number, row in enumerate(found) if row is None]
    rest = [rows[number] for number in numbers]
    tokens = tokenise_texts(tokenizer, [row.text for row in rest])
    for number, row, whole, prompt in zip(
        numbers, rest, tokens, prompts.encode(rest, tokens), strict=True
    ):
        try:
            found[number] = _label(template, row, whole, prompt, train_on)
        except RowError as error:
            found[number] = error
    return [row for row in found if row is not None]


def _rendered(template: ChatTemplate, example: Example) -> Rendered | RowError:
    """Renders a conversation with its trained spans, by the template's own markers or without."""
    empty = any(m["role"] == "assistant" and not m["content"] for m in example.messages)
    try:
        # An empty `{% generation %}` block marks nothing, and its end token would go untrained.
        if template.has_generation_markers and not empty:
            return marked_spans(template, example.messages, example.tools)
        return template.find_spans(example.messages, example.tools)
    except RowError as error:
        return error


def _label(
    template: ChatTemplate,
    row: Rendered,
    tokens: Tokens,
    prompt: list[int],
    train_on: TrainOn,
) -> Encoded:
    """Turns character spans into labels, with the last prompt's ids as generation has them."""
    tokenizer = template.tokenizer
    split = False
    if tokens.ids[: len(prompt)] != prompt and row.text.startswith(row.prompt):
        apart = _apart(tokenizer, row.text, len(row.prompt), tokens.ids)
        split = apart is not None
        tokens = apart or tokens
    ids, places = tokens.ids, tokens.places
    spans = [_token_span(tokenizer, row.text, tokens, start, end) for start, end in row.spans]
    joined = places is not None and any(
        first < last and places.start(first) < start
        for (first, last), (start, _) in zip(spans, row.spans, strict=True)
    )
    encoded = _encoded(template, row, ids, spans, train_on)
    encoded.drifted = row.drifted > 0 or joined or ids[: spans[-1][0]] != prompt
    encoded.split = split
    return encoded


def _encoded(
    template: ChatTemplate,
    row: Rendered,
    ids: list[int],
    spans: list[tuple[int, int]],
    train_on: TrainOn,
) -> Encoded:
    """Labels tokens whose trained spans are known, and adds the end that a template leaves out."""
    whole = list(ids)
    if row.open_end:
        whole += _ending(template.tokenizer, ids)
        spans = [*spans[:-1], (spans[-1][0], len(whole))]
    return Encoded(whole, _labels(whole, spans, train_on), row.drifted > 0)


def _apart(
    tokenizer: PreTrainedTokenizerBase, text: str, border: int, joined: list[int]
) -> Tokens | None:
    """Tokenises a prompt and its answer apart, where they still spell the same text.

    A byte-level tokenizer with GPT-2's word rule reads the two line breaks at the end of Llama 3's
    prompt as one token, and as two when a word follows. Generation starts after the one.

    Returns:
        Tokens, or None where the parts do not join to the text (a tokenizer that puts a
        space before every text).
    """
    prompt, answer = tokenise_texts(tokenizer, [text[:border], text[border:]])
    ids = prompt.ids + answer.ids
    if tokenizer.decode(ids) != tokenizer.decode(joined):
        return None
    if prompt.places is None or answer.places is None:
        return Tokens(ids, None)
    moved = ((start + border, stop + border) for start, stop in answer.places.offsets)
    return Tokens(ids, Places([*prompt.places.offsets, *moved]))


def _labels(ids: list[int], spans: Sequence[tuple[int, int]], train_on: TrainOn) -> list[int]:
    if train_on == "all":
        return list(ids)
    labels = [IGNORED] * len(ids)
    for start, end in spans[-1:] if train_on == "last_assistant" else spans:
        labels[start:end] = ids[start:end]
    return labels


def _token_span(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: Tokens,
    start: int,
    end: int,
) -> tuple[int, int]:
    """Returns the tokens of a character span; one that lies across its start belongs to it.

    Raises:
        RowError: The tokenizer gives no offsets, and tokenises the text before the span in
            another way alone.
    """
    if tokens.places is not None:
        # Offsets may leave out spaces around a token, so only their order is relied upon.
        first = tokens.places.first(start)
        return first, max(first, tokens.places.behind(end))
    places: list[int] = []
    for at in (start, end):
        before = encode_plain(tokenizer, [text[:at]])[0]
        if tokens.ids[: len(before)] != before:
            refuse(
                "template_span",
                "the tokenizer joins text across the border of an assistant turn, and gives no "
                "offsets to tell where",
                "use a fast tokenizer (tokenizer.json)",
            )
        places.append(len(before))
    return places[0], places[1]


def _baichuan2(
    template: ChatTemplate, examples: Sequence[Example], train_on: TrainOn
) -> list[Encoded | RowError]:
    rows: list[Encoded | RowError | None] = []
    for example in examples:
        try:
            check_baichuan2(example.messages)
            rows.append(None)
        except RowError as error:
            rows.append(error)
    good = [e.messages for e, row in zip(examples, rows, strict=True) if row is None]
    encoded = iter(baichuan2_encode(template.tokenizer, good, template.markers))
    done: list[Encoded | RowError] = []
    for row in rows:
        if row is not None:
            done.append(row)
            continue
        ids, labels = next(encoded)
        if train_on == "all":
            labels = list(ids)
        elif train_on == "last_assistant":
            last = len(ids) - 1 - ids[::-1].index(template.markers["assistant"])
            labels = [IGNORED] * last + labels[last:]
        done.append(Encoded(ids, labels))
    return done
