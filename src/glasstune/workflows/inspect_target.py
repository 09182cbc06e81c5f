"""What `glasstune inspect` is pointed at: a run, an adapter, a configuration, or a model itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.config import Config, ModelConfig
from glasstune.core.config_load import load_config
from glasstune.core.errors import InputError
from glasstune.core.inspection import SourceKind
from glasstune.workflows.open_model import ADAPTER_CONFIG, complete_steps, is_run, locate

if TYPE_CHECKING:
    from glasstune.models.inspect.source import ModelSource


@dataclass(frozen=True)
class Target:
    """Where the base is, and with what it is trained.

    Args:
        name: As the user named it.
        base: Path, hub id, or the live object.
        kind: `run` or `adapter`; None where the base's own kind holds.
        model: The run's or configuration's model section; None without one.
        bits: Precision that is trained, where a run or configuration tells it.
        adapter: Options of the adapter, None where the defaults are laid over it.
        tokenizer: Folder of the tokenizer that is used with it, where one is at hand.
        optim: The run's optimiser.
    """

    name: str
    base: Any
    kind: SourceKind | None = None
    model: ModelConfig | None = None
    bits: int | None = None
    adapter: dict[str, Any] | None = None
    tokenizer: Path | None = None
    optim: str = "adamw_torch"


def find_target(target: Any) -> Target:
    """Finds out what the user means; nothing but small files is read.

    Args:
        target: Path or name, a module, or a transformers config.

    Raises:
        InputError: A run's or adapter's files are broken, or an object is no model.
    """
    if not isinstance(target, (str, Path)):
        return Target(type(target).__name__, _live(target))
    name = str(target)
    place = Path(name).expanduser()
    if is_run(place):
        return _run(name, place)
    if (place / ADAPTER_CONFIG).is_file():
        return _adapter(name, place)
    if place.is_file() and place.suffix.lower() in (".yaml", ".yml"):
        config = load_config(place).config
        return _of_config(name, config, None, None)
    folder = place if place.is_dir() else place.parent if place.name == "config.json" else None
    return Target(name, name, tokenizer=folder)


def _live(target: Any) -> Any:
    from torch import nn

    is_config = hasattr(target, "model_type") and hasattr(target, "to_dict")
    if isinstance(target, nn.Module) or (is_config and not isinstance(target, type)):
        return target
    what = f"the class {target.__name__}" if isinstance(target, type) else type(target).__name__
    raise InputError(
        "not_a_model",
        f"{what} is neither a path nor an nn.Module",
        where="model",
        fix="give a path, a hub id, a module, or a transformers config",
    )


def open_base(target: Target, *, trust_remote_code: bool) -> ModelSource:
    """Opens the base model of a target.

    Raises:
        InputError: `base_not_found` where a run's base has moved; else as `open_source`.
    """
    from glasstune.models.inspect.source import open_source

    trust = trust_remote_code or bool(target.model and target.model.trust_remote_code)
    try:
        return open_source(target.base, trust_remote_code=trust)
    except InputError as error:
        if error.code == "remote_code_needed":
            error.fix = "read that code, then give --trust-remote-code (trust_remote_code=True)"
        if target.model is None or error.code != "model_not_found":
            raise
        raise InputError(
            "base_not_found",
            f"its base model is not there any more: {error.message}",
            where=target.name,
            fix="put the base back, or run the command in the folder in which the training ran "
            "(relative paths are taken from there); to inspect another copy, name that instead",
        ) from error


def _run(name: str, folder: Path) -> Target:
    config = load_config(folder / "config.yaml").config
    adapter = folder / "adapter"
    if not (adapter / ADAPTER_CONFIG).is_file():
        steps = complete_steps(folder / "checkpoints")
        adapter = folder / "checkpoints" / f"step-{steps[-1]}" if steps else adapter
    found = adapter if (adapter / ADAPTER_CONFIG).is_file() else None
    return _of_config(name, config, "run", found)


def _adapter(name: str, folder: Path) -> Target:
    location = locate(name)
    if location.data is not None:  # it lies in a run's folder, which tells the precision
        run = folder.parent if is_run(folder.parent) else folder.parent.parent
        config = load_config(run / "config.yaml").config
        return _of_config(name, config, "adapter", folder)
    return Target(
        name,
        location.model.path,
        "adapter",
        model=location.model,
        adapter=_saved(folder),
        tokenizer=_tokenizer(folder, location.model.path),
    )


def _of_config(name: str, config: Config, kind: SourceKind | None, saved: Path | None) -> Target:
    """A target whose base and precision a configuration tells; `saved` is its adapter folder."""
    options = config.adapter.lora_options()
    start = config.adapter.path
    if saved is not None:
        options = _saved(saved)
    elif start is not None:
        options = {**_saved(Path(start)), **config.adapter.given_options()}
    return Target(
        name,
        config.model.path,
        kind,
        model=config.model,
        bits=config.model.bits,
        adapter=options,
        tokenizer=_tokenizer(saved, config.model.path),
        optim=config.training.optim,
    )


def _saved(folder: Path) -> dict[str, Any]:
    from glasstune.adapters.overlay import saved_adapter_options

    return saved_adapter_options(folder)


def _tokenizer(saved: Path | None, base: str) -> Path | None:
    for folder in (saved, Path(base).expanduser()):
        if folder is not None and (folder / "tokenizer_config.json").is_file():
            return folder
    return None
