"""Opens what evaluate and generate work on: a run, an adapter, or a plain model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glasstune.core.choices import Choices
from glasstune.core.config import DataConfig, ModelConfig
from glasstune.core.config_load import config_from_mapping, load_config
from glasstune.core.errors import InputError
from glasstune.core.protocols import Progress

if TYPE_CHECKING:
    import torch

    from glasstune.core.facts import ModelFacts
    from glasstune.data.template import ChatTemplate
    from glasstune.models.head import HeadSplit

ADAPTER_CONFIG = "adapter_config.json"
_STEP = re.compile(r"step-\d+")


@dataclass(frozen=True)
class Location:
    """What a path means, before anything is loaded.

    Args:
        kind: Run folder, adapter folder or plain model.
        model: The base and its precision.
        adapter: Folder of the adapter; None for a plain model.
        data: The run's data settings, where there is a run.
    """

    kind: Literal["run", "adapter", "model"]
    model: ModelConfig
    adapter: Path | None = None
    data: DataConfig | None = None


@dataclass(frozen=True)
class OpenModel:
    """A model ready to run.

    Args:
        location: Where it came from.
        model: The model, with its adapter unless that was left out.
        tokenizer: The one saved with the adapter, else the base's.
        facts: Of the base.
        template: The chat template saved with the adapter, else the tokenizer's own; its kind is
            `none` where there is neither.
        split: The base before and behind its head.
        device: Where it lives.
        vocabulary: Entries of its output head.
        precision: Opens the context of a forward: autocast as in training.
        choices: What was decided, with reasons.
    """

    location: Location
    model: Any
    tokenizer: Any
    facts: ModelFacts
    template: ChatTemplate
    split: HeadSplit
    device: torch.device
    vocabulary: int
    precision: Callable[[], AbstractContextManager[Any]]
    choices: Choices


def locate(target: str, checkpoint: str | None = None) -> Location:
    """Finds out what `target` is and which adapter is meant.

    Args:
        target: Run folder, adapter folder, model folder, GGUF file or hub id.
        checkpoint: `best` (a run's `adapter/`), `last` or `step-N`; None = best.

    Raises:
        InputError: The run has no such checkpoint (those it has are named), or a checkpoint is
            asked of something that is no run.
    """
    if checkpoint not in (None, "best", "last") and not _STEP.fullmatch(str(checkpoint)):
        raise InputError(
            "bad_checkpoint",
            f"{checkpoint!r} names no checkpoint",
            where="--checkpoint",
            fix="use best, last or step-N",
        )
    folder = Path(target).expanduser()
    if is_run(folder):
        return _locate_run(folder, checkpoint)
    if checkpoint is not None:
        raise InputError(
            "no_run",
            "only a run folder has checkpoints, and this is none",
            where=target,
            fix="leave --checkpoint out, or name the run's folder",
        )
    if (folder / ADAPTER_CONFIG).is_file():
        return _locate_adapter(folder)
    return Location("model", ModelConfig(path=target))


def open_model(
    target: str,
    *,
    checkpoint: str | None = None,
    no_adapter: bool = False,
    packs: bool = True,
    choices: Choices | None = None,
    **overrides: Any,
) -> OpenModel:
    """Loads a run's, an adapter's or a plain model at its precision.

    Args:
        target: As in `locate`.
        checkpoint: As in `locate`.
        no_adapter: Leaves the adapter out: the base as the run used it.
        packs: Whether rows may hold several documents. Without, a GPU need not compile the
            attention that keeps them apart.
        choices: Where decisions are noted.
        **overrides: Keys of the `model` section that are not None replace the run's: `bits`,
            `dtype`, `device`, `trust_remote_code`.

    Raises:
        InputError: Nothing that can be opened is there, or the base cannot be loaded.
    """
    choices = choices if choices is not None else Choices()
    location = locate(target, checkpoint)
    given = {key: value for key, value in overrides.items() if value is not None}
    asked = {"model": {"path": target, **given}, "data": {"sources": [{"path": "-"}]}}
    checked = config_from_mapping(asked, name="option").config.model  # refuses a wrong value
    for key in given:
        setattr(location.model, key, getattr(checked, key))
    import torch

    from glasstune.adapters.inject import keep_activation_dtype, load_adapter_for_inference
    from glasstune.models.facts import model_facts
    from glasstune.models.families.install import install_packing
    from glasstune.models.head import fold_head, split_head
    from glasstune.models.load import autocast_dtype, load_base
    from glasstune.models.resolve import resolve_model

    config = location.model
    resolved = resolve_model(
        config.path, trust_remote_code=config.trust_remote_code, choices=choices
    )
    tokenizer, template = _tokenizer(location, resolved.folder_or_id, choices)
    facts = model_facts(resolved.config)
    base = load_base(config, resolved, choices=choices)
    template = _familys_rule(template, base, location.adapter is not None, choices)
    if facts.can_pack and packs:
        install_packing(base)
    split = split_head(base)  # before adapters: its probe runs outside autocast
    dtype = autocast_dtype(base)
    device = base.device
    model: Any = base
    if location.adapter is not None and not no_adapter:
        model = load_adapter_for_inference(base, location.adapter)
        if dtype is not None:
            keep_activation_dtype(model)
        choices.record("adapter", str(location.adapter), "the one asked for")
    fold_head(model, choices)
    model.eval()
    return OpenModel(
        location=location,
        model=model,
        tokenizer=tokenizer,
        facts=facts,
        template=template,
        split=split,
        device=device,
        vocabulary=int(split.weight.shape[0]),
        precision=nullcontext
        if dtype is None
        else lambda: torch.autocast(device.type, dtype=dtype),
        choices=choices,
    )


def say_warnings(opened: OpenModel, progress: Progress | None) -> None:
    """Says which choices of the load warn."""
    if progress is not None:
        for text in opened.choices.warnings():
            progress.say(text)


def _tokenizer(location: Location, base: str, choices: Choices) -> tuple[Any, ChatTemplate]:
    """Tokenizer and template: those saved with the adapter, else the base's (a merged one's)."""
    from glasstune.data.template import load_template
    from glasstune.data.tokenizer import load_tokenizer

    trust = location.model.trust_remote_code
    adapter = location.adapter
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        choices.record("tokenizer", str(adapter), "the one saved with the adapter")
        tokenizer = load_tokenizer(str(adapter), trust_remote_code=trust)
        return tokenizer, load_template(adapter, tokenizer)
    tokenizer = load_tokenizer(base, trust_remote_code=trust)
    return tokenizer, load_template(Path(base), tokenizer)


def _familys_rule(
    template: ChatTemplate, base: Any, adapted: bool, choices: Choices
) -> ChatTemplate:
    """Baichuan's checkpoints have no template: their format is a rule in code, ids 195 and 196.

    An adapter without a saved template is one of the published script, which trains by that rule;
    a checkpoint that was tuned for chat names the ids in its generation config.
    """
    if template.kind != "none" or base.config.model_type != "baichuan":
        return template
    from glasstune.data.template import resolve_template

    settings = base.generation_config
    names = {"user": "user_token_id", "assistant": "assistant_token_id"}
    found = {key: getattr(settings, name, None) for key, name in names.items()}
    named = {key: value for key, value in found.items() if isinstance(value, int)}
    known = named.keys() == names.keys()
    if not (adapted or known):
        return template
    reason = "the adapter has no template, and the published script trains by this rule"
    choices.record(
        "data.chat_template", "baichuan2", reason if adapted else "generation_config.json names ids"
    )
    markers = named if known else None
    return resolve_template(template.tokenizer, "baichuan2", {}, markers=markers)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of ours."""
    return (folder / "config.yaml").is_file() and any(
        (folder / name).exists() for name in ("run.json", "adapter", "checkpoints")
    )


def _locate_run(folder: Path, checkpoint: str | None) -> Location:
    config = load_config(folder / "config.yaml", []).config
    adapter = folder / "adapter"
    steps = complete_steps(folder / "checkpoints")
    if checkpoint in (None, "best"):
        if not (adapter / ADAPTER_CONFIG).is_file():
            raise _no_checkpoint(folder, "adapter/ (written when a run ends)", steps)
    else:
        name = (f"step-{steps[-1]}" if steps else "") if checkpoint == "last" else str(checkpoint)
        if name not in {f"step-{step}" for step in steps}:
            raise _no_checkpoint(folder, f"complete checkpoint {checkpoint!r}", steps)
        adapter = folder / "checkpoints" / name
    return Location("run", config.model, adapter, config.data)


def complete_steps(folder: Path) -> list[int]:
    """Returns the steps of the whole checkpoints below `folder`, rising."""
    # A folder without its mark was cut off while it was written.
    found = folder.glob("step-*/complete.json")
    return sorted(int(path.parent.name[5:]) for path in found if _STEP.fullmatch(path.parent.name))


def _no_checkpoint(folder: Path, what: str, steps: list[int]) -> InputError:
    names = ", ".join(f"step-{step}" for step in steps)
    return InputError(
        "no_checkpoint",
        f"the run has no {what}; it has " + (names or "no complete checkpoint"),
        where=str(folder),
        fix=f"use --checkpoint with {names}, or last" if steps else "train it further: --resume",
    )


def _locate_adapter(folder: Path) -> Location:
    """A bare adapter; where it lies in a run folder, the run tells base and precision."""
    for run in (folder.parent, folder.parent.parent):
        if is_run(run):
            config = load_config(run / "config.yaml", []).config
            return Location("adapter", config.model, folder, config.data)
    file = folder / ADAPTER_CONFIG
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise InputError(
            "bad_adapter", f"it is no JSON object: {error}", where=str(file), fix="save it again"
        ) from error
    if not base:
        raise InputError(
            "no_base",
            "the adapter does not say which base model it belongs to",
            where=str(file),
            fix="write the base's folder or hub id under base_model_name_or_path",
        )
    return Location("adapter", ModelConfig(path=str(base)), folder)
