"""From the `data` part of a config to packed training and validation sets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glasstune.core.batch import IntArray
from glasstune.core.choices import Choices
from glasstune.core.config import DataConfig
from glasstune.core.facts import ModelFacts
from glasstune.core.findings import Finding
from glasstune.core.protocols import Progress
from glasstune.core.records import DataRecord
from glasstune.data.choose import OpenSource, choose_settings, choose_template, open_source
from glasstune.data.documents import Store, StoredDocuments
from glasstune.data.judge import Repeats, judge_template
from glasstune.data.ledger import Ledger, Totals
from glasstune.data.packing import PackedSet
from glasstune.data.packs import PackTable
from glasstune.data.scratch import BLOCK, Numbers, blocks
from glasstune.data.sources import source_names
from glasstune.data.split import (
    HELD_OUT,
    LEFT_OUT,
    TRAINED,
    Sides,
    Texts,
    hold_out,
    repeated,
)
from glasstune.data.template import ChatTemplate
from glasstune.data.tokenise import Tokeniser
from glasstune.data.work import Shape, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        seed: Seed of the order of rows.
        opened: The sources, in the order of their names.
    """

    train: PackedSet
    validation: PackedSet | None
    record: DataRecord
    sources: tuple[str, ...]
    loss_weights: tuple[float, ...]
    fingerprint: str
    template: ChatTemplate
    config: DataConfig
    seed: int = 0
    opened: tuple[OpenSource, ...] = ()


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
    processes: int | None = None,
    stop: bool = True,
) -> PreparedData:
    """Reads, checks, tokenises, splits and packs the data of a run.

    Tokenised rows of files are kept in a cache on disk, and so is what has a number for each row;
    one byte a row stays in memory. Rows that were given from Python stay there, tokenised by this
    process alone.

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
        processes: Processes that tokenise; None decides. The result is the same for any number.
        stop: Whether errors in the rows are raised. If not, they are findings, and the training
            set may be empty.

    Returns:
        Packed sets with record, template and fingerprint.

    Raises:
        InputError: Wrong settings or a file that cannot be read; with `stop` also bad rows
            (several are shown), a token that the model has no row for, or nothing left to train.
        RunError: The disk is full, or a process that tokenises ended.
    """
    all_sources = [*config.sources, *config.validation]
    names = source_names(all_sources)
    opened = [
        open_source(source, name, base_folder)
        for source, name in zip(all_sources, names, strict=True)
    ]
    template = choose_template(config, tokenizer, opened, choices, base_folder)
    config = choose_settings(config, facts, template, choices)
    shapes = tuple(Shape(source.format, dict(source.config.columns)) for source in opened)
    task = Task(
        template, facts, config.train_on, config.max_length, config.truncation, keep_columns, shapes
    )
    store, tallies = Tokeniser(task, opened, choices, progress, processes).run()
    ledger = Ledger(names, config.on_error, tallies)
    if stop:
        ledger.raise_errors()
    judge_template(ledger, template)
    sides, doubles = _divide(config, ledger, store, seed)
    rows = _trained_rows(config, store, sides, seed)
    if not len(rows):
        if stop:
            raise ledger.nothing_left()
        error = ledger.nothing_left()
        ledger.findings.append(Finding(error.code, "error", error.where, error.message, error.fix))
    limit, packed = config.max_length, config.packing
    train = PackedSet.build(
        StoredDocuments(store, rows), max_length=limit, packed=packed, seed=seed
    )
    held = None
    held_rows = _chosen(sides, HELD_OUT, 0, len(sides))
    if len(held_rows):
        documents = StoredDocuments(store, held_rows)
        held = PackedSet.build(documents, max_length=limit, packed=packed, seed=seed)
    policies = {key: getattr(config, key) for key in ("truncation", "on_error", "duplicates")}
    record = ledger.record(_totals(store, sides, len(names)), policies, doubles)
    record.held_out = len(held_rows)
    record.fingerprint = fingerprint(train, held)
    return PreparedData(
        train=train,
        validation=held,
        record=record,
        sources=names,
        loss_weights=tuple(source.loss_weight for source in all_sources),
        fingerprint=record.fingerprint,
        template=template,
        config=config,
        seed=seed,
        opened=tuple(opened),
    )


def _divide(config: DataConfig, ledger: Ledger, store: Store, seed: int) -> tuple[Sides, int]:
    """Says which rows are trained, held out or left out as doubles.

    Returns:
        The side of each row, and the number of trained rows whose text an earlier one has.
    """
    sides = np.full(len(store), TRAINED, dtype=np.uint8)
    border = store.bounds(len(config.sources))[0]
    sides[border:] = HELD_OUT
    texts = Texts(store.key_blocks(), len(store), seed)
    drop = config.duplicates == "drop"
    repeats = Repeats(drop=drop, overlap=bool(config.validation))
    for part in texts:
        repeats.look(part, sides)
    repeats.judge(ledger, store, border)
    for source in range(len(ledger.names)):
        start, stop = store.bounds(source)
        ledger.removed[source] = int(np.count_nonzero(sides[start:stop] == LEFT_OUT))
    if not config.validation:
        hold_out(texts, sides, config.validation_split)
    return sides, repeats.doubles


def _chosen(sides: Sides, side: int, start: int, stop: int) -> IntArray:
    """Returns the rows of one side within bounds, ascending."""
    found = Numbers(np.int32)
    for first in range(start, stop, BLOCK):
        found.add(np.flatnonzero(sides[first : min(first + BLOCK, stop)] == side) + first)
    return found.whole()


def _trained_rows(config: DataConfig, store: Store, sides: Sides, seed: int) -> IntArray:
    """Returns the training rows as often as each source asks for, source by source."""
    rows = Numbers(np.int32)
    for index, source in enumerate(config.sources):
        own = _chosen(sides, TRAINED, *store.bounds(index))
        if source.repeat == 1:
            for block in blocks(own):
                rows.add(block)
        else:
            rows.add(own[repeated(len(own), source.repeat, seed, index)])
    return rows.whole()


def _totals(store: Store, sides: Sides, sources: int) -> list[Totals]:
    """Counts what is kept of each source."""
    totals = [Totals() for _ in range(sources)]
    for number, shard in store.walk():
        kept = sides[store.starts[number] : store.starts[number + 1]] != LEFT_OUT
        totals[store.pieces[number].source].add(shard.ids.lengths()[kept], shard.trained[kept])
    return totals


def fingerprint(train: PackedSet, validation: PackedSet | None) -> str:
    """Returns a SHA-256 over all that training sees: ids, labels, sources, packs, row length."""
    digest = hashlib.sha256()
    for part in (train, validation):
        if part is None:
            digest.update(b"none")
            continue
        documents, packs = part.documents, part.packs
        if not isinstance(documents, StoredDocuments) or not isinstance(packs, PackTable):
            raise TypeError("only prepared data has a fingerprint")
        digest.update(f"{part.packed} {part.max_length} {len(documents)} {len(packs)};".encode())
        for sources in documents.source_blocks():
            digest.update(sources.astype("<i2").tobytes())
        for lengths in documents.length_blocks():
            digest.update(lengths.astype("<i4").tobytes())
        for shard, start, stop in documents.runs():
            digest.update(shard.ids.many(start, stop).data)
            for lists in (shard.spans, shard.other):
                # Where one row's list ends and the next begins is part of the labels.
                digest.update(np.diff(lists.ends[start : stop + 1]).tobytes())
                digest.update(lists.many(start, stop).data)
        for block in blocks(packs.members):
            digest.update(block.astype("<i4").tobytes())
        for block in blocks(packs.ends):
            digest.update(block.astype("<i8").tobytes())
    return digest.hexdigest()
