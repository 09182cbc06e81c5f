"""`glasstune data`: reads, checks and tokenises the data of a config; loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glasstune.core.batch import IGNORED, Document
from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.protocols import Progress
from glasstune.core.records import DataRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class CheckedData:
    """Result of the data check.

    Args:
        record: Counts and findings.
        shown: Rows as text, trained parts marked.
        choices: What was decided automatically.
    """

    record: DataRecord
    shown: list[str]
    choices: Choices


def check_data(config: Config, *, show: int = 0, progress: Progress | None = None) -> CheckedData:
    """Checks the data of a configuration.

    Args:
        config: The whole configuration.
        show: How many rows to render.
        progress: Bars and log.

    Raises:
        InputError: Data, template or model are wrong.
    """
    from glasstune.data.prepare import prepare_data
    from glasstune.data.tokenizer import load_tokenizer
    from glasstune.models.facts import model_facts
    from glasstune.models.resolve import resolve_model

    choices = Choices()
    trust = config.model.trust_remote_code
    resolved = resolve_model(config.model.path, trust_remote_code=trust, choices=choices)
    tokenizer = load_tokenizer(resolved.folder_or_id, trust_remote_code=trust)
    data = prepare_data(
        config.data,
        tokenizer,
        model_facts(resolved.config),
        seed=config.training.seed,
        choices=choices,
        progress=progress,
    )
    if progress is not None:
        for choice in choices:
            progress.say(f"{choice.name}: {choice.value} ({choice.reason})")
    shown = [show_document(item, tokenizer) for item in data.train.documents[:show]]
    return CheckedData(data.record, shown, choices)


def show_document(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """Writes a document as lines of `context` and `trained` text.

    Where a label is not the token that stands there (Baichuan2's rule does that), the line says
    what is trained instead.
    """
    lines = [f"{document.origin} · {len(document)} tokens, {document.trained_tokens} trained"]
    for kind, ids in _spans(document):
        text: Any = tokenizer.decode(ids, skip_special_tokens=False)
        lines.append(f"  {kind:>7} | {text!r}")
    return "\n".join(lines) + "\n"


def _spans(document: Document) -> list[tuple[str, list[int]]]:
    spans: list[tuple[str, list[int]]] = []
    for position, (token, label) in enumerate(
        zip(document.ids.tolist(), document.labels.tolist(), strict=True)
    ):
        # The first position has no token before it that could predict it.
        if label == IGNORED or position == 0:
            kind, shown = "context", token
        elif label == token:
            kind, shown = "trained", token
        else:
            kind, shown = "instead", label
        if spans and spans[-1][0] == kind:
            spans[-1][1].append(shown)
        else:
            spans.append((kind, [shown]))
    return spans
