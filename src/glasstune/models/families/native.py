"""Architectures that transformers does not have and Glasstune does."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from glasstune.core.choices import Choice, Choices

_PACKAGES = {"baichuan": "glasstune.models.families.baichuan"}


def register_native(model_type: Any) -> bool:
    """Enters a family of our own in transformers' registries, before its config is read.

    Our class then wins over code that came with the checkpoint, also where that code is trusted.

    Args:
        model_type: What a `config.json` says.

    Returns:
        Whether the architecture is one of ours.
    """
    package = _PACKAGES.get(model_type) if isinstance(model_type, str) else None
    if package is None:
        return False
    import_module(package)
    return True


def native_choices(config: Any) -> list[Choice]:
    """Returns what a family of our own read out of a config, and that our code runs.

    Args:
        config: Of any model.
    """
    if not hasattr(config, "native_choices"):
        return []
    reason = f"{config.model_type} is built in; code that came with the checkpoint does not run"
    return [Choice("model.code", "glasstune", reason), *config.native_choices()]


def note_native(config: Any, choices: Choices) -> None:
    """Records `native_choices`."""
    for choice in native_choices(config):
        choices.record(choice.name, choice.value, choice.reason)
