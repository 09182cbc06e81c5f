"""LoRA options by PEFT's own names, checked against what PEFT knows and what the model has."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType
from torch import nn

from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.names import check_names
from glasstune.models.classes import Conv1D

BASE_MOVED = ("pissa", "olora", "corda", "lora_ga", "loftq", "mica")
"""Beginnings of `init_lora_weights` that move part of the base's weight into the adapter.

Without the moved base (its singular values depend on type and device) the adapter's tensors mean
nothing.
"""

ALL_LINEAR = "all-linear"


def lora_option_names() -> list[str]:
    """Returns the names that `LoraConfig` takes."""
    return [field.name for field in dataclasses.fields(LoraConfig) if field.init]


def build_lora_config(options: Mapping[str, Any], model: nn.Module) -> LoraConfig:
    """Checks LoRA options and makes PEFT's config from them.

    Args:
        options: Any of `LoraConfig`'s fields. `target_modules` is `all-linear` unless given (or
            `target_parameters` is), `task_type` CAUSAL_LM for a model that generates.
        model: The base model, for the names of its modules.

    Returns:
        The config; every entry of its target lists is known to hit something.

    Raises:
        InputError: `unknown_key`, `bad_value`, `target_not_found` or `module_not_found`.
    """
    check_option_names(options)
    options = {key: copy.deepcopy(value) for key, value in options.items()}  # PEFT writes into it
    if hasattr(model, "prepare_inputs_for_generation"):  # PEFT's wrapper for the task wants it
        options.setdefault("task_type", TaskType.CAUSAL_LM)
    if options.get("target_modules") is None and not options.get("target_parameters"):
        options["target_modules"] = ALL_LINEAR
    paths = [path for path, _ in model.named_modules() if path]
    _check_start(options.get("init_lora_weights"))
    if options.get("target_modules") or not options.get("target_parameters"):
        _check_targets(options.get("target_modules"), paths, model)
    _check_parameters(options.get("target_parameters"), model)
    if options.get("layers_to_transform") is not None and _is_all_linear(options["target_modules"]):
        # PEFT filters by layer only where the targets are a list of names.
        options["target_modules"] = [n for n in linear_names(model) if n != _head_name(model)]
    for key in ("modules_to_save", "exclude_modules"):
        _check_hits(key, options.get(key), paths, model)
    try:
        with peft_remarks_unsaid():
            config = LoraConfig(**options)
    except (TypeError, ValueError) as error:
        raise InputError(
            "bad_value", str(error), where="adapter", fix="see PEFT's LoraConfig"
        ) from error
    _check_patterns(config, paths, model)
    return config


def check_asked(
    asked: Mapping[str, Any], saved: LoraConfig, model: nn.Module, folder: Path
) -> None:
    """Refuses an option beside a saved adapter that is not the saved adapter's own.

    Raises:
        InputError: `unknown_key` or `contradiction`.
    """
    check_option_names(asked)
    for key, value in asked.items():
        has = getattr(saved, key)
        if key == "init_lora_weights" or _sorted(value) == _sorted(has):
            continue  # how it once started does not matter to weights that go on
        if key == "target_modules" and targeted(value, model) == targeted(has, model):
            continue
        raise InputError(
            "contradiction",
            f"adapter.{key} is {asked[key]!r}, but the adapter in {folder} has {_sorted(has)!r}",
            where=f"adapter.{key}",
            fix=f"leave {key} out: an adapter that goes on keeps its options",
        )


def drop_misses(
    options: Mapping[str, Any], model: nn.Module
) -> tuple[dict[str, Any], list[Finding]]:
    """Takes out entries that match nothing, each as the finding that a training run stops with.

    Args:
        options: Any of `LoraConfig`'s fields.
        model: The base model.

    Returns:
        Options without those entries, and the findings. A list of targets of which no entry hits
        stays as it is: `build_lora_config` refuses it.
    """
    kept = dict(options)
    findings: list[Finding] = []
    modules = [path for path, _ in model.named_modules() if path]
    parameters = [path for path, _ in model.named_parameters()]
    checks: dict[str, Callable[[str], bool]] = {
        "target_modules": lambda name: _hits(name, modules),
        "modules_to_save": lambda name: _hits(name, modules),
        "exclude_modules": lambda name: _hits(name, modules),
        "target_parameters": lambda name: _hits(name, parameters),
        "rank_pattern": lambda pattern: _pattern_hits(pattern, [*modules, *parameters]),
        "alpha_pattern": lambda pattern: _pattern_hits(pattern, [*modules, *parameters]),
    }
    for key, hits in checks.items():
        value = kept.get(key)
        if not value or isinstance(value, str):
            continue
        missing = [entry for entry in value if not hits(entry)]
        if not missing or (key.startswith("target_") and len(missing) == len(value)):
            continue
        if isinstance(value, Mapping):
            kept[key] = {name: item for name, item in value.items() if name not in missing}
        else:
            kept[key] = [name for name in value if name not in missing] or None
        error = _not_found(_matches_nothing(missing), model, key)
        findings.append(Finding(error.code, "error", error.where, error.message, error.fix))
    return kept, findings


def saved_options(config: LoraConfig) -> dict[str, Any]:
    """Returns the four options that a config always names, as plain values."""
    names = ("r", "lora_alpha", "lora_dropout", "target_modules")
    return {name: _sorted(getattr(config, name)) for name in names}


def targeted(target: Any, model: nn.Module) -> set[str]:
    """Returns the paths of the modules that a `target_modules` means."""
    paths = [path for path, _ in model.named_modules()]
    if _is_all_linear(target):
        linear, head = set(linear_names(model)), _head_name(model)
        return {path for path in paths if path.rsplit(".", 1)[-1] in linear - {head}}
    if isinstance(target, str):
        return {path for path in paths if re.fullmatch(target, path)}
    return {path for path in paths if any(_hits(name, [path]) for name in target or ())}


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def linear_names(model: nn.Module) -> list[str]:
    """Returns the last names of all modules that LoRA adapts as linear, each once, in order."""
    names = [
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    return list(dict.fromkeys(names))


@contextmanager
def peft_remarks_unsaid() -> Iterator[None]:
    """Hides what PEFT says to its programmers while it injects.

    These are: that it sets `fan_in_fan_out` right by itself, that it calls a name which
    transformers renamed, that a tied head may make merging hard (`adapter_findings` says it), and
    that a pattern which it made itself for a mixture's experts matches no module (it matches a
    parameter; a user's pattern is checked before).
    """
    with warnings.catch_warnings():
        for message in (
            "fan_in_fan_out is set to",
            "`is_gradient_checkpointing` is deprecated",
            "Model has `tie_word_embeddings=True`",
            "Model with `tie_word_embeddings=True`",
            "The following (alpha|rank)_pattern keys did not match any targeted module",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def _is_all_linear(target: Any) -> bool:
    return isinstance(target, str) and target.lower() == ALL_LINEAR


def _head_name(model: Any) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    paths = [path for path, module in model.named_modules() if module is head]
    return paths[0].rsplit(".", 1)[-1] if head is not None and paths else None


def check_option_names(options: Iterable[str]) -> None:
    """Refuses a name that `LoraConfig` does not have.

    Raises:
        InputError: `unknown_key`, with the nearest name.
    """
    check_names(
        options, lora_option_names(), code="unknown_key", owner="LoraConfig", where="adapter"
    )


def _check_start(how: Any) -> None:
    """Refuses a start that PEFT leaves to a later pass over data: without it, it is the plain one.

    Raises:
        InputError: `not_built`.
    """
    if how == "eva":
        raise InputError(
            "not_built",
            "init_lora_weights=eva needs a pass over the data, which is not built yet",
            where="adapter.init_lora_weights",
            fix="leave it out, or use one of gaussian, pissa, olora, orthogonal",
        )


def _check_parameters(asked: Any, model: nn.Module) -> None:
    """Refuses a parameter name that the model does not have; PEFT only warns."""
    paths = [path for path, _ in model.named_parameters()]
    missing = [name for name in asked or () if not _hits(name, paths)]
    if missing:
        raise _not_found(
            f"no parameter is named {', '.join(map(repr, missing))}", model, "target_parameters"
        )


def _check_targets(target: Any, paths: Sequence[str], model: nn.Module) -> None:
    if target is None or _is_all_linear(target):
        return
    if not isinstance(target, str) and not list(target):
        raise _not_found("target_modules is an empty list", model)
    _check_hits("target_modules", target, paths, model)


def _check_hits(key: str, asked: Any, paths: Sequence[str], model: nn.Module) -> None:
    """Refuses a regular expression or a list entry that matches no module; PEFT drops it."""
    if asked is None:
        return
    if isinstance(asked, str):
        try:
            found = any(re.fullmatch(asked, path) for path in paths)
        except re.error as error:
            raise InputError(
                "bad_value",
                f"{asked!r} is no regular expression: {error}",
                where=f"adapter.{key}",
                fix="a single name belongs into a list: [name]",
            ) from error
        if not found:
            raise _not_found(f"the expression {asked!r} matches no whole module path", model, key)
        return
    missing = [name for name in asked if not _hits(name, paths)]
    if missing:
        raise _not_found(_matches_nothing(missing), model, key)


def _matches_nothing(names: Sequence[str]) -> str:
    plural = "entries match" if len(names) > 1 else "entry matches"
    return f"{plural} no module: {', '.join(map(repr, names))}"


def _hits(name: str, paths: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _check_patterns(config: LoraConfig, paths: Sequence[str], model: nn.Module) -> None:
    parameters = [path for path, _ in model.named_parameters()]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key) or {}:
            if not _pattern_hits(pattern, [*paths, *parameters]):
                raise _not_found(f"the pattern {pattern!r} matches no module", model, key)


def _pattern_hits(pattern: str, paths: Iterable[str]) -> bool:
    return any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths)


def _not_found(says: str, model: nn.Module, key: str = "target_modules") -> InputError:
    code = "target_not_found" if key == "target_modules" else "module_not_found"
    quoted = re.findall(r"'([^']+)'", says)
    near = difflib.get_close_matches(quoted[0], linear_names(model), n=1) if quoted else []
    hint = f"did you mean {near[0]}? " if near else ""
    if near and "the expression" in says:
        hint = f"a name belongs into a list: [{near[0]}]; "
    return InputError(
        code,
        f"{key}: {says}. Linear modules of this model: {', '.join(linear_names(model))}",
        where=f"adapter.{key}",
        fix=f"{hint}use names of that list, or all-linear",
    )
