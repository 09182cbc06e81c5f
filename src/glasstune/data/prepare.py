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
from glasstune.data.choose import choose_settings, choose_template, open_source
from glasstune.data.documents import Store, StoredDocuments
from glasstune.data.judge import judge_overlap, judge_repeats, judge_template
from glasstune.data.ledger import Ledger
from glasstune.data.packing import PackedSet, PackTable
from glasstune.data.sources import source_names
from glasstune.data.split import first_of_each, held_out, repeated
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

    Tokenised rows of files are kept in a cache on disk; what stays in memory is about 40 bytes a
    row.

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
    sides = _Sides.divide(config, ledger, store, seed)
    rows = sides.repeat(config, store, seed)
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
    if len(sides.validation):
        documents = StoredDocuments(store, sides.validation)
        held = PackedSet.build(documents, max_length=limit, packed=packed, seed=seed)
    policies = {key: getattr(config, key) for key in ("truncation", "on_error", "duplicates")}
    kept = StoredDocuments(store, np.sort(np.concatenate([sides.train, sides.validation])))
    record = ledger.record(kept, policies, sides.doubles)
    record.held_out = len(sides.validation)
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
    )


@dataclass
class _Sides:
    """Which rows of the store are trained and which validate.

    Args:
        train: In the order of the data.
        validation: The same.
        doubles: Training rows whose text an earlier row has.
    """

    train: IntArray
    validation: IntArray
    doubles: int

    @classmethod
    def divide(cls, config: DataConfig, ledger: Ledger, store: Store, seed: int) -> _Sides:
        """Leaves out doubles where asked to, and divides the rest."""
        keys = store.keys()
        border = len(config.sources)
        train = np.flatnonzero(store.sources < border).astype(np.int32)
        validation = np.flatnonzero(store.sources >= border).astype(np.int32)
        drop = config.duplicates == "drop"
        doubles = judge_repeats(ledger, store, keys, train, drop=drop)
        if drop:
            every = len(train) + len(validation)
            train = train[first_of_each(keys[train])]
            validation = validation[first_of_each(keys[validation])]
            if every > len(train) + len(validation):
                kept = np.bincount(store.sources[np.concatenate([train, validation])])
                for source, count in enumerate(np.bincount(store.sources).tolist()):
                    ledger.removed[source] = count - (
                        int(kept[source]) if source < len(kept) else 0
                    )
        if config.validation:
            judge_overlap(ledger, store, keys, train, validation)
        else:
            if len(train) < len(keys):
                keys = keys[train]
            held = held_out(keys, config.validation_split, seed)
            train, validation = train[~held], train[held]
        return cls(train, validation, doubles)

    def repeat(self, config: DataConfig, store: Store, seed: int) -> IntArray:
        """Returns the training rows as often as each source asks for, source by source."""
        sources = store.sources[self.train]
        parts = []
        for index, source in enumerate(config.sources):
            own = self.train[sources == index]
            parts.append(own[repeated(len(own), source.repeat, seed, index)])
        return np.concatenate(parts)


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
        digest.update(documents.sources.astype("<i2").tobytes())
        digest.update(documents.lengths.astype("<i4").tobytes())
        for shard, start, stop in documents.runs():
            digest.update(shard.ids.many(start, stop).data)
            for lists in (shard.spans, shard.other):
                # Where one row's list ends and the next begins is part of the labels.
                digest.update(np.diff(lists.ends[start : stop + 1]).tobytes())
                digest.update(lists.many(start, stop).data)
        digest.update(packs.members.astype("<i4").tobytes())
        digest.update(packs.ends.astype("<i8").tobytes())
    return digest.hexdigest()
