"""From the `data` part of a config to packed training and validation sets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glasstune.core.batch import IGNORED, Document
from glasstune.core.choices import Choices
from glasstune.core.config import DataConfig
from glasstune.core.errors import InputError
from glasstune.core.facts import ModelFacts
from glasstune.core.protocols import Progress
from glasstune.core.records import DataRecord
from glasstune.data import checks
from glasstune.data.choose import OpenSource, choose_settings, choose_template, open_source
from glasstune.data.encode import Encoded, encode_examples
from glasstune.data.errors import RowError
from glasstune.data.formats import Example, InputJoin, to_example
from glasstune.data.ledger import Ledger
from glasstune.data.packing import PackedSet
from glasstune.data.read import BadRow, ReadStats
from glasstune.data.sources import source_names
from glasstune.data.split import first_of_each, held_out, repeated, text_key
from glasstune.data.template import ChatTemplate
from glasstune.data.tokenizer import fewest_tokens, known_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256
_TASK = "data"
_HUGE = 200_000
"""Characters of one text from which a row may be found too long without tokenising it."""


@dataclass
class PreparedData:
    """Data ready to train.

    Args:
        train: Training rows.
        validation: Held-out rows, or None.
        record: Counts and findings.
        sources: Names; `Document.source` is an index into them (validation files come last).
        loss_weights: Weight of each source's tokens in the loss.
        fingerprint: SHA-256 over all ids, labels, packs and the options that order them.
        template: The chat template.
        config: The config with the values that were used where it left them open.
    """

    train: PackedSet
    validation: PackedSet | None
    record: DataRecord
    sources: tuple[str, ...]
    loss_weights: tuple[float, ...]
    fingerprint: str
    template: ChatTemplate
    config: DataConfig


def prepare_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    facts: ModelFacts,
    *,
    seed: int,
    keep_columns: bool = False,
    choices: Choices,
    progress: Progress | None = None,
    base_folder: Path = Path("."),
) -> PreparedData:
    """Reads, checks, tokenises, splits and packs the data of a run.

    Args:
        config: The `data` part of the config.
        tokenizer: The base model's tokenizer.
        facts: What the model can hold.
        seed: Seed of the held-out choice, of partial repeats and of the packs.
        keep_columns: Whether columns that no format reads are kept in `Document.columns`, for
            a loss function.
        choices: Where automatic choices are noted.
        progress: Shows the rows while they are tokenised.
        base_folder: Folder that relative paths start from.

    Returns:
        Packed sets with record, template and fingerprint.

    Raises:
        InputError: Wrong settings, a file that cannot be read, bad rows (several are shown), a
            token that the model has no row for, or nothing left to train.
    """
    all_sources = [*config.sources, *config.validation]
    names = source_names(all_sources)
    stats = ReadStats()
    opened = [
        open_source(source, name, base_folder, stats)
        for source, name in zip(all_sources, names, strict=True)
    ]
    template = choose_template(config, tokenizer, opened, choices, base_folder)
    config = choose_settings(config, facts, template, choices)
    ledger = Ledger(names, config.on_error)
    worker = _Worker(config, template, facts, ledger, keep_columns)
    documents: list[Document] = []
    keys: list[bytes] = []
    if progress is not None:
        progress.start(_TASK, None, "rows")
    for index, source in enumerate(opened):
        for count, rows in worker.rows(index, source):
            documents += [document for document, _ in rows]
            keys += [key for _, key in rows]
            if progress is not None:
                progress.advance(_TASK, count)
    if progress is not None:
        progress.finish(_TASK)
    ledger.raise_errors()
    checks.report(ledger, stats, template, worker.seen_ids)
    documents, keys = _without_doubles(config, ledger, documents, keys)
    train, validation = _divide(config, ledger, documents, keys, seed)
    if not train:
        raise _nothing_left(ledger)
    copies = [
        train[source][k]
        for source in range(len(config.sources))
        for k in repeated(len(train.get(source, [])), config.sources[source].repeat, seed, source)
    ]
    if not copies:
        raise _nothing_left(ledger)
    build = {"max_length": config.max_length, "packed": config.packing, "seed": seed}
    train_set = PackedSet.build(copies, **build)  # type: ignore[arg-type]
    held = PackedSet.build(validation, **build) if validation else None  # type: ignore[arg-type]
    kept = [document for rows in train.values() for document in rows] + validation
    return PreparedData(
        train=train_set,
        validation=held,
        record=ledger.record(kept),
        sources=names,
        loss_weights=tuple(source.loss_weight for source in all_sources),
        fingerprint=fingerprint(train_set, held),
        template=template,
        config=config,
    )


class _Worker:
    """Turns the rows of a source into documents, a chunk at a time."""

    def __init__(
        self,
        config: DataConfig,
        template: ChatTemplate,
        facts: ModelFacts,
        ledger: Ledger,
        keep_columns: bool,
    ) -> None:
        self.config = config
        self.template = template
        self.facts = facts
        self.ledger = ledger
        self.keep_columns = keep_columns
        self.seen_ids = np.zeros(max(facts.vocabulary_rows, len(template.tokenizer)), dtype=bool)
        tokens = known_tokens(template.tokenizer)
        self.control = re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def rows(
        self, index: int, source: OpenSource
    ) -> Iterator[tuple[int, list[tuple[Document, bytes]]]]:
        """Yields the number of rows read and the documents with text keys that they gave."""
        while chunk := list(islice(source.rows, _CHUNK)):
            self.ledger.rows[index] += len(chunk)
            examples: list[Example] = []
            for row in chunk:
                if isinstance(row, BadRow):
                    self.ledger.bad_row(index, row.origin, RowError(row.code, row.message))
                    continue
                try:
                    example = self._example(source, row.value, row.origin)
                    if not self._surely_too_long(index, example):
                        examples.append(example)
                except RowError as error:
                    self.ledger.bad_row(index, row.origin, error)
            found = encode_examples(self.template, examples, self.config.train_on)
            documents: list[tuple[Document, bytes]] = []
            for example, encoded in zip(examples, found, strict=True):
                if isinstance(encoded, RowError):
                    self.ledger.bad_row(index, example.origin, encoded)
                elif (document := self._document(index, example, encoded)) is not None:
                    texts = example.texts()
                    documents.append((document, text_key(texts)))
                    self._note_control(example.origin, texts)
                    checks.note_answer(self.ledger, example)
            yield len(chunk), documents

    def _example(self, source: OpenSource, value: dict[str, object], origin: str) -> Example:
        join: InputJoin = "alpaca" if self.template.name == "alpaca" else "blank_line"
        return to_example(
            value,
            origin,
            source.format,
            source.config.columns,
            join=join,
            keep_columns=self.keep_columns,
        )

    def _surely_too_long(self, index: int, example: Example) -> bool:
        """Drops a row with a text of megabytes before it costs minutes in the tokenizer."""
        texts = example.texts()
        longest = max(texts, key=len) if texts else ""
        if len(longest) < _HUGE or self.config.truncation == "cut" or "</think>" in longest:
            return False
        tokens = fewest_tokens(self.template.tokenizer, longest)
        if tokens <= self.config.max_length:
            return False
        self._drop_too_long(index, example.origin, f"{len(longest)} characters in one text")
        return True

    def _drop_too_long(self, index: int, origin: str, size: str) -> None:
        self.ledger.drop(index, "too_long")
        self.ledger.note(
            "too_long",
            "warning",
            origin,
            f"{{count}} rows are longer than max_length {self.config.max_length} and are left "
            f"out; the first has {size}",
            "raise data.max_length, or set data.truncation: cut",
        )

    def _document(self, index: int, example: Example, row: Encoded) -> Document | None:
        """Checks and cuts one row; None where it is dropped."""
        limit = self.config.max_length
        self._check_ids(example.origin, row.ids)
        if len(row.ids) > limit and self.config.truncation == "drop":
            self._drop_too_long(index, example.origin, f"{len(row.ids)} tokens")
            return None
        if len(row.ids) > limit:
            checks.note_cut(self.ledger, example.origin, len(row.ids), limit)
            cut(row, limit, exact=self.template.kind == "baichuan2")
        checks.note_row(self.ledger, example.origin, row)
        if all(label == IGNORED for label in row.labels[1:]):
            self.ledger.drop(index, "no_trained_tokens")
            self.ledger.note(
                "no_trained_tokens",
                "warning",
                example.origin,
                "{count} rows have no trained token (the answer is cut off or missing) and are "
                "left out",
                "raise data.max_length, or look at these rows",
            )
            return None
        return Document(
            np.asarray(row.ids, dtype=np.int32),
            np.asarray(row.labels, dtype=np.int32),
            index,
            example.origin,
            example.columns,
        )

    def _check_ids(self, origin: str, ids: Sequence[int]) -> None:
        highest = max(ids, default=0)
        if highest >= self.facts.vocabulary_rows:
            token = self.template.tokenizer.convert_ids_to_tokens(highest)
            raise InputError(
                "token_beyond_vocabulary",
                f"the tokenizer gives {token!r} the id {highest}, but the model's embedding has "
                f"{self.facts.vocabulary_rows} rows",
                where=origin,
                fix="use the tokenizer that belongs to the model, or a model resized for its "
                "added tokens",
            )
        self.seen_ids[ids] = True

    def _note_control(self, origin: str, texts: Sequence[str]) -> None:
        for text in texts:
            if found := self.control.search(text):
                self.ledger.note(
                    "control_token_in_text",
                    "warning",
                    origin,
                    f"the texts of {{count}} rows hold control tokens (the first: "
                    f"{found.group()!r}), which the tokenizer reads as such",
                    "remove them from the rows, unless they are meant",
                )
                return


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


def _without_doubles(
    config: DataConfig, ledger: Ledger, documents: list[Document], keys: list[bytes]
) -> tuple[list[Document], list[bytes]]:
    """Leaves out rows whose text came before, where asked to; the files of each side apart."""
    if config.duplicates == "keep":
        return documents, keys
    border = len(config.sources)
    sides = [int(document.source >= border).to_bytes(1, "big") for document in documents]
    kept = first_of_each([side + key for side, key in zip(sides, keys, strict=True)])
    for index in sorted(set(range(len(documents))) - set(kept)):
        ledger.drop(documents[index].source, "duplicate")
    return [documents[k] for k in kept], [keys[k] for k in kept]


def _divide(
    config: DataConfig, ledger: Ledger, documents: list[Document], keys: list[bytes], seed: int
) -> tuple[dict[int, list[Document]], list[Document]]:
    """Returns training documents by source, and held-out documents."""
    border = len(config.sources)
    pairs = list(zip(documents, keys, strict=True))
    training = [key for document, key in pairs if document.source < border]
    if config.validation:
        checks.note_overlap(ledger, pairs, border, set(training))
        chosen: set[bytes] = set()
    else:
        chosen = held_out(training, config.validation_split, seed)
    train: dict[int, list[Document]] = {}
    validation: list[Document] = []
    for document, key in pairs:
        if document.source >= border or key in chosen:
            validation.append(document)
        else:
            train.setdefault(document.source, []).append(document)
    return train, validation


def _nothing_left(ledger: Ledger) -> InputError:
    reasons = {k: n for counter in ledger.dropped for k, n in counter.items()}
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no rows"
    first = (
        f"; the first: {ledger.errors[0][0]}: {ledger.errors[0][1].message}"
        if ledger.errors
        else ""
    )
    return InputError(
        "no_training_rows",
        f"no row is left to train ({listed}){first}",
        where="data.sources",
        fix="raise data.max_length where rows are too long, or correct the rows",
    )


def fingerprint(train: PackedSet, validation: PackedSet | None) -> str:
    """Returns a SHA-256 over all that training sees: ids, labels, sources, packs, row length."""
    digest = hashlib.sha256()
    for part in (train, validation):
        if part is None:
            digest.update(b"none")
            continue
        digest.update(f"{part.packed} {part.max_length} {len(part.documents)};".encode())
        for document in part.documents:
            digest.update(f"{document.source} {len(document)};".encode())
            digest.update(document.ids.tobytes() + document.labels.tobytes())
        for pack in part.packs:
            digest.update(f"{len(pack)};".encode() + pack.tobytes())
    return digest.hexdigest()
