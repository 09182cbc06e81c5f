"""What an adapter would add to each module of a base model, without the base's weights.

PEFT itself injects into a model on the meta device, so every option counts as in a real load.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.nn import Parameter

from glasstune.adapters.inject import add_adapter, read_lora_config
from glasstune.adapters.options import build_lora_config, drop_misses, targeted
from glasstune.adapters.overlay_findings import (
    experts_not_adapted,
    linear_not_adapted,
    rank_above_size,
    saved_module_broad,
    tied_weights,
)
from glasstune.core.findings import Finding
from glasstune.core.inspection import LoraOverlay

DEFAULTS: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
}
"""The adapter that a configuration without an `adapter` section trains."""

_SMALL = 4096  # bitsandbytes keeps the moments of smaller tensors in float32
_BLOCK = 256  # values that share a scale in its 8-bit moments


@dataclass(frozen=True)
class Overlay:
    """An adapter laid over a tree.

    Args:
        rows: Path in the base model to what is added there.
        trained: Paths of modules of which a tensor of their own is trained (a bias, or the copy
            that `modules_to_save` makes).
        trainable_parameters: All that needs a gradient, by logical shape.
        all_parameters: Base and adapter, by logical shape, tied ones once.
        peft_line: What `print_trainable_parameters` prints.
        bytes: Adapter, gradients and optimiser state together. A tensor of the base's own that
            is trained (a bias) is in the base's total already, and only what it needs beside.
        options: Of the adapter, as JSON.
        findings: Traps that do not depend on the precision of the base.
    """

    rows: dict[str, LoraOverlay]
    trained: frozenset[str]
    trainable_parameters: int
    all_parameters: int
    peft_line: str
    bytes: int
    options: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)


def no_overlay(model: nn.Module, *findings: Finding) -> Overlay:
    """Lays nothing over a model: nothing of it is trained.

    Args:
        model: A model that holds no weights.
        *findings: Why.
    """
    _, total = count_parameters(model)
    return Overlay({}, frozenset(), 0, total, peft_line(0, total), 0, {}, list(findings))


def overlay(
    model: nn.Module, options: Mapping[str, Any] | None = None, *, optim: str = "adamw_torch"
) -> Overlay:
    """Lays an adapter over a model that holds no weights.

    Masters and gradients are float32; AdamW keeps two float32 moments, `adamw_8bit` two int8 ones
    with a float32 scale each 256 values (below 4,096 values float32 too). The step counters and
    the code table that all tensors share are left out.

    Args:
        model: A 16-bit model on the meta device; PEFT wraps its modules in place.
        options: `LoraConfig`'s fields over `DEFAULTS`.
        optim: `training.optim`.

    Raises:
        InputError: An option does not exist, PEFT refuses it, or nothing at all would be adapted.
            A list of which only some entries hit is a finding.
    """
    asked = {**DEFAULTS, **copy.deepcopy(dict(options or {}))}
    if asked.get("target_parameters") and "target_modules" not in (options or {}):
        asked["target_modules"] = None
    used, findings = drop_misses(asked, model)
    plain = dict(model.named_modules())
    narrowed = any(used.get(key) for key in ("exclude_modules", "layers_to_transform"))
    build_lora_config(used, model)  # refuses a broken expression before it is matched
    expected = set() if narrowed else targeted(used.get("target_modules"), model)
    with torch.device("meta"):
        wrapped = add_adapter(model, **used)
    found = existing_overlay(wrapped, optim=optim)
    findings += [
        *found.findings,
        *rank_above_size(plain, found.rows),
        *saved_module_broad(used.get("modules_to_save") or (), found.rows),
        *linear_not_adapted(plain, expected, found.rows),
        *experts_not_adapted(plain, found.rows, found.all_parameters),
    ]
    asked["target_modules"] = _short(asked["target_modules"], list(plain))
    return dataclasses.replace(
        found,
        options=_plain(asked),
        findings=findings,
        # PEFT doubles a packed 4-bit weight, and here even that has its logical shape.
        peft_line=peft_line(found.trainable_parameters, found.all_parameters),
    )


def existing_overlay(model: nn.Module, *, optim: str = "adamw_torch") -> Overlay:
    """Reads the adapter that a live model carries, with its own types and gradients.

    Args:
        model: A `PeftModel`, or a module somewhere around or with one; left as it is. Paths are
            those of its tree without PEFT's wrappers. A frozen adapter has bytes of weights only.
        optim: As in `overlay`.
    """
    sums: dict[str, _Sum] = {}
    for part in _parts(model):
        sums.setdefault(part.path, _Sum()).add(part, optim)
    trainable, total = count_parameters(model)
    config = _active_config(model)
    is_peft = isinstance(model, PeftModel)
    return Overlay(
        rows={path: entry.row() for path, entry in sums.items()},
        trained=frozenset(path for path, entry in sums.items() if entry.own),
        trainable_parameters=trainable,
        all_parameters=total,
        peft_line=_printed(model) if is_peft else peft_line(trainable, total),
        bytes=sum(entry.bytes for entry in sums.values()),
        options={} if config is None else _live_options(config, model),
        findings=tied_weights(model) if is_peft else [],
    )


def carries_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put something into a module."""
    kinds = (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)
    return any(isinstance(part, kinds) for part in model.modules())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns how many parameters need a gradient and how many there are, by logical shape."""
    trainable = total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        count = math.prod(shape) if shape is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def peft_line(trainable: int, total: int) -> str:
    """Says both counts as `PeftModel.print_trainable_parameters` does."""
    share = 100 * trainable / total if total else 0.0
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"


def adapter_options(config: Any) -> dict[str, Any]:
    """Returns the options of a PEFT config that are not its class's defaults, as JSON.

    Rank, alpha, dropout and targets of LoRA are named always.
    """
    left_out = ("base_model_name_or_path", "inference_mode", "peft_type", "revision", "task_type")
    always = DEFAULTS if isinstance(config, LoraConfig) else {"peft_type": None}
    plain = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        default = (
            item.default_factory()
            if item.default_factory is not dataclasses.MISSING
            else item.default
        )
        hidden = item.name in left_out or item.name in ("auto_mapping", "peft_version")
        if item.name in always or (value != default and not hidden):
            plain[item.name] = _plain(value)
    return plain


def saved_adapter_options(folder: Path | str) -> dict[str, Any]:
    """Returns the options of an adapter folder, ready for `overlay`.

    Raises:
        InputError: `no_adapter` or `bad_adapter`: none there, unreadable, or not LoRA.
    """
    return adapter_options(read_lora_config(Path(folder)))


@dataclass(frozen=True, slots=True)
class _Part:
    """A parameter of the adapter, or one of the base that is trained."""

    path: str
    kind: str
    parameter: Parameter
    layer: nn.Module | None = None
    own: bool = False
    copied: bool = False


@dataclass(slots=True)
class _Sum:
    """What several parameters add at one module."""

    kinds: list[str] = field(default_factory=list)
    r: int | None = None
    alpha: float | None = None
    own: bool = False
    parameters: int = 0
    weights: int = 0
    in_base: int = 0
    gradients: int = 0
    moments: int = 0

    def add(self, part: _Part, optim: str) -> None:
        """Takes one parameter in."""
        if part.kind not in self.kinds:
            self.kinds.append(part.kind)
        if self.r is None and part.layer is not None:
            self.r, self.alpha = _rank(part.layer)
        self.own |= part.own and part.parameter.requires_grad
        count = part.parameter.numel()
        self.parameters += count
        size = count * part.parameter.element_size()
        self.weights += size
        self.in_base += size if part.own and not part.copied else 0
        if part.parameter.requires_grad:
            self.gradients += size
            self.moments += moment_bytes(count, optim)

    @property
    def bytes(self) -> int:
        """What it needs beside the base."""
        return self.weights - self.in_base + self.gradients + self.moments

    def row(self) -> LoraOverlay:
        """Returns the record."""
        return LoraOverlay(
            kind="+".join(self.kinds),
            r=self.r,
            lora_alpha=self.alpha,
            parameters=self.parameters,
            weight_bytes=self.weights,
            gradient_bytes=self.gradients,
            optimizer_bytes=self.moments,
        )


def moment_bytes(count: int, optim: str) -> int:
    """Returns the bytes of both moments of a float32 tensor of `count` values."""
    if optim == "adamw_8bit" and count >= _SMALL:
        return 2 * (count + 4 * math.ceil(count / _BLOCK))
    return 2 * 4 * count


def _parts(model: nn.Module) -> Iterator[_Part]:
    """Yields each parameter that an adapter brings or trains, once."""
    seen: set[int] = set()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for part in _walk(base, "", None):
        if id(part.parameter) not in seen:
            seen.add(id(part.parameter))
            yield part
    if isinstance(model, PeftModel):
        inner = {id(parameter) for parameter in base.parameters()}
        kind = str(getattr(model.peft_type, "value", model.peft_type)).lower()
        for parameter in model.parameters():  # a prompt encoder stands beside the base
            if id(parameter) not in inner:
                yield _Part("", kind, parameter)


def _walk(module: nn.Module, path: str, copied: str | None) -> Iterator[_Part]:
    """Walks the base's tree through PEFT's wrappers.

    Args:
        module: Where to start.
        path: Its path in the base, wrappers left out.
        copied: The kind of a whole copy that is trained, inside such a copy.
    """
    if isinstance(module, BaseTunerLayer):
        base = module.get_submodule("base_layer")
        inner = {id(parameter) for parameter in base.parameters()}
        for parameter in module.parameters():
            if id(parameter) not in inner:
                yield _Part(path, _kind(module), parameter, module)
        yield from _walk(base, path, copied)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        if isinstance(module, ModulesToSaveWrapper):
            for whole in module.modules_to_save.values():
                yield from _walk(whole, path, "modules_to_save")
            yield from _walk(module.original_module, path, copied)
        else:
            yield from _walk(module.get_submodule("token_adapter"), path, copied)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            if copied is not None:
                yield _Part(path, copied, parameter, own=True, copied=True)
            elif parameter.requires_grad:
                yield _Part(path, "bias" if name == "bias" else "full", parameter, own=True)
        for name, child in module.named_children():
            yield from _walk(child, f"{path}.{name}" if path else name, copied)


def _kind(layer: BaseTunerLayer) -> str:
    if isinstance(layer, LoraLayer):
        return "dora" if len(layer.lora_magnitude_vector) else "lora"
    return type(layer).__module__.split(".")[2]  # peft.tuners.ia3.layer


def _rank(layer: Any) -> tuple[int | None, float | None]:
    ranks, alphas = getattr(layer, "r", {}), getattr(layer, "lora_alpha", {})
    if not isinstance(ranks, Mapping):
        return None, None
    for name in (*layer.active_adapters, *ranks):
        if name in ranks:
            return int(ranks[name]), float(alphas[name]) if name in alphas else None
    return None, None


def _printed(model: PeftModel) -> str:
    text = io.StringIO()
    with redirect_stdout(text):
        model.print_trainable_parameters()
    return text.getvalue().strip()


def _active_config(model: nn.Module) -> Any | None:
    for part in model.modules():
        configs = getattr(part, "peft_config", None)
        if isinstance(configs, Mapping) and configs:
            active = getattr(part, "active_adapters", ())
            names = active() if callable(active) else active  # transformers' own is a method
            return configs.get(next(iter(names), ""), next(iter(configs.values())))
    return None


def _live_options(config: Any, model: nn.Module) -> dict[str, Any]:
    options = adapter_options(config)
    if "target_modules" in options:  # PEFT puts full paths in the place of `all-linear`
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        options["target_modules"] = _short(options["target_modules"], list(_base_paths(base)))
    return options


def _base_paths(module: nn.Module, path: str = "") -> Iterator[str]:
    """Yields the paths of the base's own modules."""
    yield path
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        inner = "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"
        module = module.get_submodule(inner)
    for name, child in module.named_children():
        yield from _base_paths(child, f"{path}.{name}" if path else name)


def _short(targets: Any, paths: list[str]) -> Any:
    """Says a list of full paths by its last names, where that means the same."""
    if isinstance(targets, str) or not targets or not set(targets) <= set(paths):
        return targets
    names = {path.rsplit(".", 1)[-1] for path in targets}
    same = {path for path in paths if path.rsplit(".", 1)[-1] in names} == set(targets)
    return sorted(names) if same else targets


def _plain(value: Any) -> Any:
    """Turns sets, enums and nested options into what JSON holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
