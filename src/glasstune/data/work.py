"""Rows of a piece to documents: read, shaped, rendered, tokenised, checked. Runs in any process."""

from __future__ import annotations

import gc
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np

from glasstune.core.batch import IGNORED, IntArray
from glasstune.core.facts import ModelFacts
from glasstune.data import checks
from glasstune.data.chunks import Chunk
from glasstune.data.encode import Encoded, encode_examples
from glasstune.data.errors import RowError
from glasstune.data.formats import Example, Format, InputJoin, read_keys, to_example
from glasstune.data.read import BadRow, RawRow, ReadStats
from glasstune.data.shards import Row
from glasstune.data.split import text_key
from glasstune.data.tally import Tally
from glasstune.data.template import ChatTemplate, TrainOn
from glasstune.data.texts import count_letters
from glasstune.data.tokenizer import fewest_tokens, known_tokens

_BATCH = 256
"""Rows that go through the tokenizer together."""
_HUGE = 200_000
"""Characters of one text from which a row may be found too long without tokenising it."""
_MEDIA = {"image", "images", "video", "videos", "audio", "audios"}
_JSON = (str, int, float, bool, type(None))


@contextmanager
def _no_collector() -> Iterator[None]:
    """Holds Python's collector of cycles back: it walks all of transformers again and again.

    A tenth of the time is saved; what a piece leaves behind is collected after it.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Shape:
    """How a source's rows are read: its format and its `columns` mapping."""

    format: Format
    columns: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """All that turns rows into ids and labels; equal tasks give equal rows.

    Args:
        template: The chat template with its tokenizer.
        facts: What the model can hold.
        train_on: Which text is trained.
        max_length: Longest document in tokens.
        truncation: What happens to a longer one.
        keep_columns: Whether columns that no format reads are kept.
        shapes: Per source.
        plain_columns: Whether only columns that JSON can hold are kept (rows go to disk).
    """

    template: ChatTemplate
    facts: ModelFacts
    train_on: TrainOn
    max_length: int
    truncation: Literal["drop", "cut"]
    keep_columns: bool
    shapes: tuple[Shape, ...]
    plain_columns: bool = True


@dataclass
class Worker:
    """Works on pieces; holds what is computed once for all of them."""

    task: Task
    control: re.Pattern[str] = field(init=False)
    added: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = self.task.template.tokenizer
        tokens = known_tokens(tokenizer)
        self.control = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self.added = tuple(sorted(tokenizer.get_added_vocab().values()))
        self.facts = checks.RowFacts.of(self.task.template)

    def work(self, source: int, chunk: Chunk) -> tuple[list[Row], Tally]:
        """Turns a piece into rows to store, and counts what happened to each.

        Raises:
            InputError: The file cannot be read any further.
        """
        tally, stats = Tally(), ReadStats()
        shape = self.task.shapes[source]
        rows: list[Row] = []
        reading = chunk.read(stats)
        with _no_collector():
            while batch := list(islice(reading, _BATCH)):
                tally.rows += len(batch)
                examples = list(self._examples(shape, batch, tally))
                rows += self._encode(examples, tally)
        tally.kept = len(rows)
        tally.blank = dict(stats.blank_lines)
        tally.added = self._added_in(rows)
        return rows, tally

    def _added_in(self, rows: Sequence[Row]) -> list[int]:
        seen = np.zeros(self.task.facts.vocabulary_rows, dtype=bool)
        for row in rows:
            seen[row.ids] = True
        return [index for index in self.added if index < len(seen) and seen[index]]

    def _encode(self, examples: Sequence[Example], tally: Tally) -> list[Row]:
        encoded = encode_examples(self.task.template, examples, self.task.train_on)
        seen: list[str] = []
        rows: list[Row] = []
        for example, found in zip(examples, encoded, strict=True):
            try:
                row = self._row(example, found, tally, seen)
            except RowError as error:
                tally.bad_row(example.origin, error)
            else:
                rows += [] if row is None else [row]
        count_letters(seen, tally.letters)
        return rows

    def _examples(
        self, shape: Shape, rows: Sequence[RawRow | BadRow], tally: Tally
    ) -> Iterator[Example]:
        join = input_join(self.task.template)
        read = read_keys(shape.format, shape.columns)
        for row in rows:
            if isinstance(row, BadRow):
                tally.bad_row(row.origin, RowError(row.code, row.message))
                continue
            try:
                example = to_example(
                    row.value,
                    row.origin,
                    shape.format,
                    shape.columns,
                    join=join,
                    keep_columns=self.task.keep_columns,
                )
            except RowError as error:
                tally.bad_row(row.origin, error)
                continue
            if unread := row.value.keys() - read:
                self._note_unread(row, sorted(map(str, unread)), tally)
            if not self._surely_too_long(example, tally):
                yield example

    def _note_unread(self, row: RawRow, columns: Sequence[str], tally: Tally) -> None:
        """Notes columns that are left out, images most of all."""
        for name in columns:
            value = row.value.get(name)
            if value is None or (isinstance(value, (str, list, dict)) and not value):
                continue
            if name in _MEDIA:
                tally.note(
                    "media_left_out",
                    "warning",
                    row.origin,
                    f"{{count}} rows bring more than text (the first: {name!r}), which is not "
                    "trained: only their text is",
                    "take these rows out, unless their texts make sense alone",
                )
            elif not self.task.keep_columns:
                tally.column(name)

    def _surely_too_long(self, example: Example, tally: Tally) -> bool:
        """Drops a row with a text of megabytes before it costs minutes in the tokenizer."""
        texts = example.texts()
        longest = max(texts, key=len) if texts else ""
        if len(longest) < _HUGE or self.task.truncation == "cut" or "</think>" in longest:
            return False
        tokens = fewest_tokens(self.task.template.tokenizer, longest)
        if tokens <= self.task.max_length:
            return False
        self._drop_too_long(tally, example.origin, f"{len(longest)} characters in one text")
        return True

    def _drop_too_long(self, tally: Tally, origin: str, size: str) -> None:
        tally.drop("too_long")
        tally.note(
            "too_long",
            "warning",
            origin,
            f"{{count}} rows are longer than max_length {self.task.max_length} and are left "
            f"out; the first has {size}",
            "raise data.max_length, or set data.truncation: cut",
        )

    def _row(
        self, example: Example, found: Encoded | RowError, tally: Tally, seen: list[str]
    ) -> Row | None:
        """Checks and cuts one row; None where it is left out.

        Raises:
            RowError: The row is wrong.
        """
        if isinstance(found, RowError):
            raise found
        limit, origin = self.task.max_length, example.origin
        if not self._ids_fit(origin, found.ids, tally):
            return None
        over = len(found.ids) - limit
        if over > 0 and self.task.truncation == "drop":
            self._drop_too_long(tally, origin, f"{len(found.ids)} tokens")
            return None
        if over > 0:
            checks.note_cut(tally, origin, len(found.ids), limit)
            cut(found, limit, exact=self.task.template.kind == "baichuan2")
        labels = _int32(found.labels)
        if not (labels[1:] != IGNORED).any():
            checks.drop_untrained(tally, origin)
            return None
        texts = example.texts()
        self.facts.note(tally, example, found, whole=over <= 0)
        checks.note_texts(tally, origin, texts, self.control)
        seen += texts
        columns = self._columns(example, tally)
        return Row(_int32(found.ids), labels, origin, text_key(texts), columns)

    def _ids_fit(self, origin: str, ids: Sequence[int], tally: Tally) -> bool:
        rows = self.task.facts.vocabulary_rows
        highest = max(ids, default=0)
        if highest < rows:
            return True
        token = self.task.template.tokenizer.convert_ids_to_tokens(highest)
        tally.drop("token_beyond_vocabulary")
        tally.note(
            "token_beyond_vocabulary",
            "error",
            origin,
            f"the tokenizer gives {token!r} the id {highest}, but the model's embedding has "
            f"{rows} rows",
            "use the tokenizer that belongs to the model, or a model resized for its added tokens",
        )
        return False

    def _columns(self, example: Example, tally: Tally) -> Mapping[str, Any]:
        if not self.task.plain_columns or not example.columns:
            return example.columns
        kept = {key: value for key, value in example.columns.items() if _is_json(value)}
        for key in example.columns.keys() - kept.keys():
            kind = type(example.columns[key]).__name__
            tally.note(
                "column_left_out",
                "warning",
                example.origin,
                f"{{count}} values are not handed to loss functions (the first: {key!r}, a {kind})",
                "store it as text or as a number",
            )
        return kept


def input_join(template: ChatTemplate) -> InputJoin:
    """Returns how an alpaca row's input is put after its instruction."""
    return "alpaca" if template.name == "alpaca" else "blank_line"


def _int32(values: list[int]) -> IntArray:
    # Three times as fast as asking NumPy to look at every number.
    return np.frombuffer(array("i", values), dtype=np.int32)


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return isinstance(value, _JSON)


def cut(row: Encoded, limit: int, *, exact: bool) -> None:
    """Cuts a row to `limit` tokens; a cut answer gets no end token.

    Args:
        row: Changed in place.
        limit: Tokens to keep.
        exact: Whether to keep context behind the last trained token (nothing is learnt from it,
            and a template's markers may be cut through there).
    """
    row.ids, row.labels = row.ids[:limit], row.labels[:limit]
    if exact:
        return
    while row.labels and row.labels[-1] == IGNORED:
        row.labels.pop()
    row.ids = row.ids[: len(row.labels)]
