"""Glasstune: a glass-box LoRA fine-tuner.

Names below load on first use, so that `import glasstune` stays light (no torch).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "train": "glasstune.workflows.api:train",
    "evaluate": "glasstune.workflows.evaluate:evaluate",
    "generate": "glasstune.workflows.generate:generate",
    "inspect_model": "glasstune.workflows.inspect:inspect_model",
    "merge": "glasstune.workflows.merge:merge",
    "load_model": "glasstune.workflows.api:load_model",
    "add_adapter": "glasstune.adapters.inject:add_adapter",
    "LossBatch": "glasstune.training.terms:LossBatch",
    "GlasstuneCallback": "glasstune.integrations.callback:GlasstuneCallback",
    "term_loss": "glasstune.integrations.term_loss:term_loss",
    "GradientAudit": "glasstune.workflows.gradient_audit:GradientAudit",
    "speed_up": "glasstune.fast.speed_up:speed_up",
    "load_config": "glasstune.core.config_load:load_config",
}
__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module, attribute = _EXPORTS[name].split(":")
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'glasstune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
