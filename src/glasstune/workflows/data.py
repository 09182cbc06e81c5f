"""`glasstune data`: reads, checks and tokenises the data of a config; loads no weights."""

from __future__ import annotations

from dataclasses import dataclass

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.mask import ShownRow
from glasstune.core.protocols import Progress
from glasstune.core.records import DataRecord


@dataclass(frozen=True, slots=True)
class CheckedData:
    """Result of the data check.

    Args:
        record: Counts and findings; those of severity error would stop a run.
        shown: Rows as training gets them, each token with its state.
        choices: What was decided automatically.
    """

    record: DataRecord
    shown: list[ShownRow]
    choices: Choices

    @property
    def failed(self) -> bool:
        """Whether `train` would refuse this data."""
        return any(finding.severity == "error" for finding in self.record.findings)


def check_data(config: Config, *, show: int = 0, progress: Progress | None = None) -> CheckedData:
    """Checks the data of a configuration.

    What is read and tokenised here is what `train` takes from the cache with the same config.

    Args:
        config: The whole configuration.
        show: How many rows to show, in the order of the first epoch.
        progress: Bars and log.

    Raises:
        InputError: Data, template or model are wrong in a way that leaves nothing to check.
        RunError: The disk is full.
    """
    from glasstune.data.mask import show_rows
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
        keep_columns=any(loss.function for loss in config.losses),
        choices=choices,
        progress=progress,
        stop=False,
    )
    if progress is not None:
        for choice in choices:
            progress.say(f"{choice.name}: {choice.value} ({choice.reason})")
    return CheckedData(data.record, show_rows(data, show), choices)
