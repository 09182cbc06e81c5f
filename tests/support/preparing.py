"""Data preparation in one line, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chat_tokenizers import chat_tokenizer

from glasstune.core.choices import Choices
from glasstune.core.config import DataConfig
from glasstune.core.facts import ModelFacts
from glasstune.core.findings import Finding
from glasstune.data.prepare import PreparedData, prepare_data

FACTS = ModelFacts("llama", 512, 4096, True, "tested")
CHATML = chat_tokenizer("chatml")
BASE = chat_tokenizer(None)


def alpaca(count: int, **extra: Any) -> list[dict[str, Any]]:
    return [{"instruction": f"why {k}?", "output": f"Because {k}.", **extra} for k in range(count)]


def prepare(
    sources: Any,
    tokenizer: Any = CHATML,
    *,
    facts: ModelFacts = FACTS,
    seed: int = 0,
    keep_columns: bool = False,
    choices: Choices | None = None,
    base_folder: Path = Path("."),
    processes: int | None = None,
    stop: bool = True,
    **options: Any,
) -> PreparedData:
    if isinstance(sources, (str, Path)):
        sources = [{"path": str(sources)}]
    elif not isinstance(sources[0], dict) or "path" not in sources[0]:
        sources = [{"path": sources}]
    options.setdefault("validation_split", 0) if "validation" not in options else None
    config = DataConfig(sources=sources, **options)
    return prepare_data(
        config,
        tokenizer,
        facts,
        seed=seed,
        keep_columns=keep_columns,
        choices=Choices() if choices is None else choices,
        base_folder=base_folder,
        processes=processes,
        stop=stop,
    )


def finding(data: PreparedData, code: str) -> Finding:
    return next(found for found in data.record.findings if found.code == code)


def codes(data: PreparedData) -> set[str]:
    return {found.code for found in data.record.findings}
