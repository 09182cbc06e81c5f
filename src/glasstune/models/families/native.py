"""Architectures that transformers does not have and Glasstune does."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from glasstune.core.choices import Choices

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


def note_native(config: Any, choices: Choices) -> None:
    """Records what a family of our own read out of a config, and that our code runs."""
    if str(config.model_type) not in _PACKAGES:
        return
    reason = f"{config.model_type} is built in; code that came with the checkpoint does not run"
    choices.record("model.code", "glasstune", reason)
    for choice in config.native_choices():
        choices.record(choice.name, choice.value, choice.reason)
