"""Settings that the user left open: format of each source, template, longest document, packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.choices import Choices
from glasstune.core.config import DataConfig, SourceConfig
from glasstune.core.errors import InputError
from glasstune.core.facts import ModelFacts
from glasstune.data.errors import RowError
from glasstune.data.formats import (
    Format,
    check_columns,
    detect_format,
    refuse_preference,
    to_example,
)
from glasstune.data.hub import load_hub
from glasstune.data.named import NAMES
from glasstune.data.read import BadRow, RawRow, ReadStats, read_rows
from glasstune.data.sources import hub_rows, python_rows, source_files
from glasstune.data.template import ChatTemplate, resolve_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PEEK = 32
"""Rows of a source that are looked at to tell its format."""


@dataclass(slots=True)
class OpenSource:
    """A source whose format is known and whose rows are still to be read.

    Args:
        config: Its settings.
        name: Its name in records.
        format: The shape of its rows.
        first: The first whole row.
        files: Its files, or None.
        table: The hub's data set, or None.
    """

    config: SourceConfig
    name: str
    format: Format
    first: RawRow
    files: list[Path] | None = None
    table: Any = None

    def rows(self, stats: ReadStats) -> Iterator[RawRow | BadRow]:
        """Reads all rows from the start.

        Raises:
            InputError: One of the reader's own errors.
        """
        if self.config.rows is not None:
            yield from python_rows(self.config.rows)
        elif self.table is not None:
            yield from hub_rows(self.table, self.config)
        for path in self.files or ():
            yield from read_rows(path, stats)


def open_source(config: SourceConfig, name: str, base_folder: Path) -> OpenSource:
    """Opens a source and finds its format.

    Raises:
        InputError: No such file, no row, no known format, or a mapping that names no key.
    """
    files, table = None, None
    if config.rows is None:
        files = source_files(config, base_folder)
        if files is None:
            table = load_hub(config.path, config.subset, config.split)
    source = OpenSource(config, name, "text", RawRow({}, ""), files, table)
    reading = source.rows(ReadStats())
    head = list(islice(reading, _PEEK))
    reading.close()  # type: ignore[attr-defined]
    whole = [row for row in head if isinstance(row, RawRow)]
    if not whole:
        bad = next((row for row in head if isinstance(row, BadRow)), None)
        raise InputError(
            bad.code if bad else "empty_source",
            f"no row can be read: {bad.message}" if bad else "holds no row",
            where=bad.origin if bad else config.path,
            fix="give a file with rows: a JSON array, JSONL, CSV, TSV or Parquet",
        )
    source.first = whole[0]
    values = [row.value for row in whole]
    if config.format == "auto":
        source.format = detect_format(values, config.columns, whole[0].origin)
    else:
        source.format = config.format
        check_columns(config.columns, source.format, f"data source {name}")
        refuse_preference(values[0], config.columns, whole[0].origin)
    return source


def choose_template(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[OpenSource],
    choices: Choices,
    base_folder: Path,
) -> ChatTemplate:
    """Finds the run's chat template.

    Raises:
        InputError: A template is needed and none is named; shows a row as `plain` renders it.
    """
    name = config.chat_template
    formats = {source.format for source in sources}
    if "baichuan2" in formats:
        if name not in (None, "baichuan2"):
            raise InputError(
                "template_conflict",
                f"format: baichuan2 encodes without a template, but chat_template is {name!r}",
                where="data.chat_template",
                fix="leave chat_template out, or read the source as format: conversations",
            )
        reason = "the sources' format baichuan2 is the model's published rule"
        name = choices.record("data.chat_template", "baichuan2", reason)
    elif name is None and not tokenizer.chat_template:
        name = _without_template(config, tokenizer, sources, choices, base_folder)
    elif name is None:
        choices.record("data.chat_template", "tokenizer", "the tokenizer brings its own template")
    return resolve_template(
        tokenizer,
        name,
        config.chat_template_kwargs,
        base_folder=base_folder,
        markers=config.markers,
    )


def _without_template(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[OpenSource],
    choices: Choices,
    base_folder: Path,
) -> str:
    chats = [s for s in sources if s.format in ("conversations", "messages")]
    if chats:
        raise InputError(
            "no_chat_template",
            f"{chats[0].name} holds conversations, and the tokenizer has no chat template (it "
            f"belongs to a base model).{_sample(chats[0], tokenizer)}",
            where="data.chat_template",
            fix=f"name one: {', '.join(NAMES)}, or a Jinja file",
        )
    if any(source.format == "alpaca" for source in sources):
        return str(
            choices.record(
                "data.chat_template",
                "alpaca",
                "the tokenizer has no chat template; alpaca rows get their published prompt",
            )
        )
    return str(
        choices.record(
            "data.chat_template",
            "none",
            "the tokenizer has no chat template; texts stay as they are, a prompt and its "
            "completion are tokenised apart and joined",
        )
    )


def _sample(source: OpenSource, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        example = to_example(
            source.first.value, source.first.origin, source.format, source.config.columns
        )
        template = resolve_template(tokenizer, "plain", {})
        text = template.text(example.messages, None, False)
    except (RowError, InputError):
        return ""
    shown = text if len(text) <= 400 else text[:400] + " ..."
    return f" {source.first.origin} with the template `plain` would read:\n{shown}\n"


def choose_settings(
    config: DataConfig, facts: ModelFacts, template: ChatTemplate, choices: Choices
) -> DataConfig:
    """Settles longest document, truncation and packing.

    Returns:
        A copy of the config with the values that are used; written to a run's config it gives
        the same data again.

    Raises:
        InputError: `max_length` was given and is more than the model can place.
    """
    given = config.model_fields_set
    settled: dict[str, object] = {}
    limit = facts.max_positions
    if limit is not None and config.max_length > limit:
        if "max_length" in given:
            raise InputError(
                "max_length_over_positions",
                f"max_length is {config.max_length}, but the model has {limit} positions",
                where="data.max_length",
                fix=f"set data.max_length to {limit} or less",
            )
        reason = f"the model has {limit} positions, fewer than the default of {config.max_length}"
        settled["max_length"] = choices.record("data.max_length", limit, reason)
    if template.kind == "baichuan2" and "truncation" not in given:
        reason = "the published baichuan2 rule cuts at max_length"
        settled["truncation"] = choices.record("data.truncation", "cut", reason)
    if config.validation:
        settled["validation_split"] = 0.0
    if config.packing:
        packing = choices.record("data.packing", facts.can_pack, facts.pack_reason)
        settled["packing"] = packing
    return config.model_copy(update=settled)
