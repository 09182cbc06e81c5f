"""The Python API: `glasstune.train`, `glasstune.load_model`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glasstune.core.choices import WARNING, Choices
from glasstune.core.config import Config, ModelConfig
from glasstune.core.config_load import LoadedConfig, config_from_mapping, load_config
from glasstune.core.protocols import Progress
from glasstune.core.records import DryRunRecord, TrainRecord


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    data: str | None = None,
    resume: str | bool | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> TrainRecord | DryRunRecord:
    """Trains an adapter, as `glasstune train` does.

    Args:
        config: A `Config`, a mapping of the same shape (a source's `path` may be a list of rows),
            or a YAML file; None where `model` and `data` say enough.
        overrides: `key=value` with dots; not with a `Config`.
        model: `model.path`.
        data: Path of the only data source.
        resume: True for the newest complete checkpoint, or `step-N`.
        overwrite: Whether a run in the output folder is replaced.
        dry_run: Only checks data and resolves the config.
        progress: Bars and log; None draws them on stderr.

    Raises:
        InputError: Config, data, model or folder are wrong; nothing was trained.
        RunError: The run failed or a gate refused.
        StoppedBySignal: SIGINT or SIGTERM; a checkpoint was saved.
    """
    from glasstune.workflows.train import train as run

    loaded = _loaded(config, overrides, model, data)
    return run(
        loaded.config,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
        notes=loaded.notes,
    )


def _loaded(
    config: Config | Mapping[str, Any] | str | Path | None,
    overrides: Sequence[str],
    model: str | None,
    data: str | None,
) -> LoadedConfig:
    if isinstance(config, Config):
        if overrides or model is not None or data is not None:
            raise TypeError("a Config takes no overrides: change its attributes")
        return LoadedConfig(config.model_copy(deep=True))
    if isinstance(config, Mapping):
        return config_from_mapping(config, overrides, model=model, data=data)
    path = None if config is None else Path(config)
    return load_config(path, overrides, model=model, data=data)


def load_model(path: str, **options: Any) -> tuple[Any, Any]:
    """Loads a base model at 16, 8 or 4 bit and its tokenizer.

    Args:
        path: Hub id, folder or GGUF file.
        **options: Further keys of the config's `model` section (`bits`, `dtype`, `device`, ...).

    Returns:
        A plain transformers model (frozen) and its tokenizer.

    Raises:
        InputError: The path or an option is wrong.
    """
    from glasstune.data.tokenizer import load_tokenizer
    from glasstune.models.load import load_base
    from glasstune.models.resolve import resolve_model

    mapping = {"model": {"path": path, **options}, "data": {"sources": [{"path": "-"}]}}
    config: ModelConfig = config_from_mapping(mapping, name="load_model").config.model
    choices = Choices()
    trust = config.trust_remote_code
    resolved = resolve_model(config.path, trust_remote_code=trust, choices=choices)
    model = load_base(config, resolved, choices=choices)
    for text in choices.warnings():
        warnings.warn(text.removeprefix(WARNING), stacklevel=2)
    return model, load_tokenizer(resolved.folder_or_id, trust_remote_code=trust)
