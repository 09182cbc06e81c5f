"""The chat template of a run: which one, its variables, its pinned date; saved with the adapter."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from glasstune.core.errors import InputError
from glasstune.core.files import write_json_atomic
from glasstune.data.baichuan2 import DEFAULT_MARKERS, baichuan2_prompt, marker_ids
from glasstune.data.errors import RowError, refuse
from glasstune.data.named import JINJA, NAMES, named_source
from glasstune.data.roles import Message
from glasstune.data.skeleton import Skeleton, learn_skeleton, roles_of
from glasstune.data.spans import (
    NO_TRAITS,
    Rendered,
    TemplateTraits,
    Tools,
    find_spans,
    learn_template,
)
from glasstune.data.tokenizer import begin_ids, closing_tokens, encode_plain, end_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last_assistant", "all"]

TEMPLATE_FILE = "glasstune_template.json"
PINNED_DATE = "2024-07-26"
"""Date that a template reading the clock gets: a constant, so that a resume, a second run and
generation next year see the same ids. It is the one that Llama 3.1's own template falls back to."""

_CLOCK = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])((?:(?!\1).)*)\1\s*\)""")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class ChatTemplate:
    """How conversations become ids.

    Args:
        tokenizer: The tokenizer.
        name: `tokenizer` (its own), a shipped name, a file's path, or `none`.
        kind: `jinja`; `baichuan2` (ids built turn by turn); `none` (a base model: texts only).
        source: Jinja text without and with tools, the clock's calls already replaced.
        kwargs: Extra variables of the template.
        markers: Marker ids of the Baichuan2 rule.
        pinned_date: ISO date, where the template reads the clock.
        traits: What its probe showed (kind `jinja`).
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    kind: Literal["jinja", "baichuan2", "none"]
    source: tuple[str, str] = ("", "")
    kwargs: dict[str, Any] = field(default_factory=dict)
    markers: dict[str, int] = field(default_factory=lambda: dict(DEFAULT_MARKERS))
    pinned_date: str | None = None
    traits: TemplateTraits = NO_TRAITS
    _seen: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)
    _skeletons: dict[tuple[str, ...], Skeleton | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def has_generation_markers(self) -> bool:
        """Whether the template itself says what the assistant generates."""
        return bool(_GENERATION.search(self.source[0]))

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which generation ends: the end token and what closes an assistant's turn."""
        ids = [] if (end := end_id(self.tokenizer)) is None else [end]
        for text in self.traits.end_tokens:
            token = self.traits.token.match(text)
            found = self.tokenizer.convert_tokens_to_ids(token.group()) if token else None
            if isinstance(found, int) and found not in ids:
                ids.append(found)
        return ids

    def text(self, messages: Sequence[Message], tools: Tools, generation: bool) -> str:
        """Renders a conversation to text (kind `jinja`).

        Raises:
            RowError: The template refuses it; carries the template's own words.
        """
        plain = not tools and _is_plain(messages)
        own = cast(Hashable, type(self.tokenizer))
        compiled = _compiled(own, self.source[0]) if plain else None
        if compiled is None:
            rendered: str = self.apply(
                messages, tools, add_generation_prompt=generation, tokenize=False
            )
            return rendered
        # What `apply_chat_template` does to texts alone, without its copies: a third of its time.
        try:
            return str(
                compiled.render(
                    messages=messages,
                    tools=None,
                    documents=None,
                    add_generation_prompt=generation,
                    **self._variables(),
                )
            )
        except Exception as error:
            raise _refused(error) from error

    def find_spans(self, messages: Sequence[Message], tools: Tools) -> Rendered:
        """Renders a conversation and finds its assistant turns (kind `jinja`).

        Raises:
            RowError: The template refuses the row, or its turns cannot be found exactly.
        """
        roles = None if tools else roles_of(messages)
        if roles is not None:
            if roles not in self._skeletons:
                self._skeletons[roles] = learn_skeleton(self.text, roles, self.traits)
            skeleton = self._skeletons[roles]
            if skeleton is not None and (row := skeleton.render(self.text, messages)) is not None:
                return row
        return find_spans(self.text, messages, tools, self.traits)

    def _variables(self) -> dict[str, Any]:
        """Returns what the template sees beside the messages; put together once."""
        if self._seen is None:
            self._seen = {**self.tokenizer.special_tokens_map, **self.kwargs}
        return self._seen

    def apply(self, messages: Sequence[Message], tools: Tools, **options: Any) -> Any:
        """Calls `apply_chat_template` with this template, its variables and `options`.

        Raises:
            RowError: The template refuses the conversation; carries its own words.
        """
        source = self.source[1] if tools else self.source[0]
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=source, **options, **self.kwargs
            )
        except Exception as error:  # a template can raise anything, its own text most of all
            raise _refused(error) from error

    def render_prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Returns the ids after which the assistant's next text comes.

        Args:
            messages: A conversation that ends with the user's or a tool's turn.
            tools: JSON schemas of functions.

        Raises:
            RowError: The template cannot render it.
        """
        if self.kind == "none":
            refuse(
                "no_template", "this model has no chat template: give a text, not a conversation"
            )
        if self.kind == "baichuan2":
            return baichuan2_prompt(self.tokenizer, messages, self.markers)
        return encode_plain(self.tokenizer, [self.text(messages, tools, True)])[0]

    def encode(
        self, messages: Sequence[Message], tools: Tools = None, train_on: TrainOn = "assistant"
    ) -> tuple[list[int], list[int]]:
        """Returns ids and labels of a whole conversation, uncut.

        Raises:
            RowError: The row cannot be rendered, or its turns not be found.
        """
        from glasstune.data.encode import encode_examples
        from glasstune.data.formats import Example

        example = Example("chat", messages=list(messages), tools=tools)
        found = encode_examples(self, [example], train_on)[0]
        if isinstance(found, RowError):
            raise found
        return found.ids, found.labels

    def to_dict(self) -> dict[str, Any]:
        """Returns what must be kept to render the same ids again."""
        return {
            "name": self.name,
            "kind": self.kind,
            "kwargs": self.kwargs,
            "markers": self.markers if self.kind == "baichuan2" else None,
            "pinned_date": self.pinned_date,
        }

    def save(self, folder: Path) -> None:
        """Writes the tokenizer with this template, and `glasstune_template.json`.

        The template goes out with its date pinned, so that other programs render the same ids.
        """
        kept = self.tokenizer.chat_template
        try:
            if self.kind == "jinja":
                plain, tools = self.source
                same = plain == tools
                self.tokenizer.chat_template = (
                    plain if same else {"default": plain, "tool_use": tools}
                )
            self.tokenizer.save_pretrained(str(folder))
        finally:
            self.tokenizer.chat_template = kept
        write_json_atomic(folder / TEMPLATE_FILE, self.to_dict())


@lru_cache
def _compiled(tokenizer: Hashable, source: str) -> Any:
    """Returns a compiled template, or None where the tokenizer renders in its own way."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    own = getattr(tokenizer, "apply_chat_template", None)
    if own is not PreTrainedTokenizerBase.apply_chat_template:
        return None
    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compile_template is None:
        return None
    template = compile_template(source).environment.from_string(source)
    # It was a chain of mappings, which every rendering walks through twice in Python.
    template.globals = dict(template.globals)
    return template


def _is_plain(messages: Sequence[Message]) -> bool:
    return all(
        message.keys() == {"role", "content"} and type(message["content"]) is str
        for message in messages
    )


def _refused(error: Exception) -> RowError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RowError("template_refuses", f"the chat template refuses this conversation: {first}")


def marked_spans(template: ChatTemplate, messages: Sequence[Message], tools: Tools) -> Rendered:
    """Renders a conversation whose template marks what the assistant generates.

    The marks are taken as characters: transformers' own token mask leaves out a blank at the end
    of an answer, which some tokenizers' offsets do not cover. The end token right behind a block
    is trained with it.

    Raises:
        RowError: The template refuses the row, or does not mark each assistant turn.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    text = template.text(messages, tools, False)
    rendered, indices = render_jinja_template(
        conversations=[list(messages)],
        tools=tools,
        chat_template=template.source[1] if tools else template.source[0],
        return_assistant_tokens_mask=True,
        **{**template.tokenizer.special_tokens_map, **template.kwargs},
    )
    blocks: list[tuple[int, int]] = []
    for start, end in indices[0]:
        if blocks and blocks[-1][1] == start:
            start = blocks.pop()[0]
        if end > start:
            blocks.append((start, end))
    answers = sum(message["role"] == "assistant" for message in messages)
    if rendered[0] != text or len(blocks) != answers:
        refuse(
            "template_span",
            f"the template's {{% generation %}} markers show {len(blocks)} assistant turns of "
            f"{answers}",
            "correct the template, or use one without markers",
        )
    ends = template.traits.end_tokens
    spans: list[tuple[int, int]] = []
    for start, end in blocks:
        follows = next((token for token in ends if text.startswith(token, end)), "")
        spans.append((start, end + len(follows)))
    start, end = spans[-1]
    open_end = not text[start:end].rstrip().endswith(ends or ("\0",))
    if open_end:
        spans[-1] = (start, len(text))
    prompt = template.text(messages[:-1], tools, True)
    return Rendered(text, tuple(spans), open_end, prompt, 0)


def load_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Returns the template that `save` wrote, for the tokenizer loaded from the same folder.

    A folder of another program, without `glasstune_template.json`, gives the tokenizer's own.

    Raises:
        InputError: The file is damaged, or the tokenizer has lost its template.
    """
    path = folder / TEMPLATE_FILE
    if not path.is_file():
        own = None if tokenizer.chat_template else "none"
        return resolve_template(tokenizer, own, {})
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kind, name, kwargs = kept["kind"], kept["name"], dict(kept["kwargs"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            "bad_template_file", f"is damaged: {error}", where=str(path), fix="save the run again"
        ) from error
    if kind != "jinja":
        return resolve_template(tokenizer, kind, kwargs, markers=kept.get("markers"))
    template = resolve_template(tokenizer, None, kwargs)
    template.name = name
    template.pinned_date = kept.get("pinned_date")
    return template


def resolve_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    kwargs: Mapping[str, Any],
    *,
    base_folder: Path = Path("."),
    markers: Mapping[str, int] | None = None,
) -> ChatTemplate:
    """Finds and probes the chat template.

    Args:
        tokenizer: The tokenizer.
        chat_template: None for its own; chatml, alpaca, plain or baichuan2; `none`; or a file.
        kwargs: Extra variables of the template. `pinned_date` (ISO) is taken out: it is the date
            that a template reading the clock gets.
        base_folder: Folder that a file's relative path starts from.
        markers: Marker ids of the Baichuan2 rule.

    Raises:
        InputError: No such name or file, the tokenizer has no template, or the template fails on
            a question and an answer.
    """
    variables = dict(kwargs)
    date = _date(variables.pop("pinned_date", PINNED_DATE))
    if chat_template == "none":
        return ChatTemplate(tokenizer, "none", "none")
    if chat_template == "baichuan2":
        ids = marker_ids(markers, len(tokenizer))
        return ChatTemplate(tokenizer, "baichuan2", "baichuan2", kwargs=variables, markers=ids)
    name, sources = _sources(tokenizer, chat_template, base_folder)
    pinned = tuple(pin_clock(source, date, name) for source in sources)
    reads_clock = pinned != sources
    template = ChatTemplate(
        tokenizer,
        name,
        "jinja",
        source=(pinned[0], pinned[1]),
        kwargs=variables,
        pinned_date=date.isoformat() if reads_clock else None,
    )
    try:
        template.traits = learn_template(template.text, closing_tokens(tokenizer))
    except RowError as error:
        raise InputError(
            "template_fails",
            f"the chat template cannot render a question and its answer: {error.message}",
            where=f"chat template ({name})",
            fix="give a working one with data.chat_template: " + ", ".join(NAMES) + " or a file",
        ) from error
    return template


def _date(value: Any) -> datetime.date:
    try:
        return datetime.date.fromisoformat(str(value))
    except ValueError as error:
        raise InputError(
            "bad_date",
            f"{value!r} is no date",
            where="data.chat_template_kwargs.pinned_date",
            fix='write it as "2024-07-26"',
        ) from error


def _sources(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, base_folder: Path
) -> tuple[str, tuple[str, str]]:
    """Returns the template's name and its text without and with tools."""
    if chat_template is None:
        if not tokenizer.chat_template:
            raise InputError(
                "no_chat_template",
                "the tokenizer has no chat template (it belongs to a base model)",
                where="data.chat_template",
                fix="name one: " + ", ".join(NAMES) + ", or a Jinja file",
            )
        plain: str = tokenizer.get_chat_template(None, None)
        with_tools: str = tokenizer.get_chat_template(None, [{}])
        return "tokenizer", (plain, with_tools)
    if chat_template in JINJA:
        adds_bos = tokenizer.bos_token_id in begin_ids(tokenizer)
        source = named_source(chat_template, tokenizer, adds_bos=adds_bos)
        return chat_template, (source, source)
    path = base_folder / Path(chat_template).expanduser()
    if not path.is_file():
        raise InputError(
            "no_such_template",
            f"{chat_template!r} is neither a template's name nor a file",
            where="data.chat_template",
            fix="use " + ", ".join(NAMES) + ", or the path of a Jinja file",
        )
    source = path.read_text(encoding="utf-8-sig")
    return str(path), (source, source)


def pin_clock(source: str, date: datetime.date, name: str) -> str:
    """Replaces a template's calls of the clock by a fixed date.

    Raises:
        InputError: A call computes its format, so that it cannot be replaced.
    """
    pinned = _CLOCK.sub(lambda match: repr(date.strftime(match.group(2))), source)
    if "strftime_now(" in pinned.replace(" ", ""):
        raise InputError(
            "template_clock",
            "the chat template asks for today's date in a computed format, so it cannot be pinned",
            where=f"chat template ({name})",
            fix="copy it to a file with the date written out, and set data.chat_template to it",
        )
    return pinned
