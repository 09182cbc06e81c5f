"""The door: any PEFT LoRA model, sped up in place and undone at will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from glasstune.adapters.lora_layers import adapted_modules
from glasstune.core.choices import Choices
from glasstune.core.errors import InputError
from glasstune.core.speed import ModuleSpeed, SpeedWay
from glasstune.fast.bases import asks_fp8, stored_bits
from glasstune.fast.blocks import find_blocks, find_norms
from glasstune.fast.compile import RECOMPILE_LIMIT, Compile, compile_regions, decide
from glasstune.fast.group import Group
from glasstune.fast.groups import WATCHED, make_groups
from glasstune.fast.members import attach, forget
from glasstune.fast.report import SpeedReport
from glasstune.models.families.install import (
    attention_installed,
    install_attention,
    uninstall_attention,
)
from glasstune.models.packed import is_four_bit
from glasstune.models.quantization import guard_cpu_4bit

_REPORTS: WeakKeyDictionary[nn.Module, SpeedReport] = WeakKeyDictionary()


def speed_up(
    model: nn.Module,
    *,
    compile: Compile = "auto",
    updates: int | None = None,
    example: Mapping[str, Any] | None = None,
    choices: Choices | None = None,
    memory_budget: float | None = None,
    compile_options: Mapping[str, Any] | None = None,
) -> SpeedReport:
    """Speeds up a model with LoRA layers, in place; its module tree stays PEFT's.

    Layers that take the same input are computed as one product with LoRA inside, and each decoder
    block is compiled; on a GPU BLOOM's attention, which makes every score, becomes a kernel. What
    cannot be (dropout in training, DoRA, several adapters, ...) is computed as before and said in
    the report. Merging, switching off, loading, another adapter, `.to()` and saving work as ever.

    Until `undo`, weights of a 16-bit base are views into larger tensors, except in a state dict,
    where they are contiguous. An adapter that is written through `.data` between two forwards
    without gradients is not seen.

    Args:
        model: A PEFT model, or any model with LoRA layers in it.
        compile: `auto` decides and says why.
        updates: How many updates will be made, for `auto`.
        example: Keyword arguments of a forward, where `input_ids` alone is not enough.
        choices: Where automatic choices are noted; the report has them too.
        memory_budget: Share of the activations that compiled blocks keep, 0 to 1; the rest is
            recomputed. None leaves torch's own setting.
        compile_options: More of `torch.compile`'s options, for example `{"dynamic": False}` where
            all batches have one shape.

    Returns:
        The report; `report.undo()` takes everything back.

    Raises:
        InputError: `nothing_adapted`: no LoRA layer. `no_compiler`: asked for where it cannot
            work. `bad_budget`: outside 0 to 1.
    """
    if memory_budget is not None and not 0 <= memory_budget <= 1:
        raise InputError("bad_budget", f"memory_budget is {memory_budget}, not within 0 and 1")
    adapted = adapted_modules(model)
    if not adapted:
        raise InputError(
            "nothing_adapted",
            "no module of the model has a LoRA adapter",
            fix="add one first (gt.add_adapter, or peft.get_peft_model)",
        )
    slow_down(model)
    for layer in adapted.values():
        forget(layer)  # of the model that this one is a copy of
    choices = Choices() if choices is None else choices
    device = next(model.parameters()).device
    compiled, why = decide(compile, device, updates, choices)
    restore: list[Callable[[], object]] = [_forgetting(ref(model))]
    if device.type == "cpu" and any(is_four_bit(module) for module in model.modules()):
        guard_cpu_4bit(model)
    groups, refused, how = make_groups(model, example)
    hooks = attach(groups)
    for group in groups:
        group.look(in_training=True)
    regions: dict[str, nn.Module] = {}
    if compiled:
        blocks = find_blocks(model, adapted)
        both = {**blocks, **find_norms(model, blocks)}
        _prepare_compiler(model, memory_budget, choices, restore)
        _replace_attention(model, choices, restore)
        done = compile_regions(both, groups, dict(compile_options or {}))
        regions = {path: both[path] for path in done}
    modules = _modules(adapted, groups, refused, how, regions, why)
    report = SpeedReport(modules, groups, hooks, regions, choices, restore)
    _REPORTS[model] = report
    return report


def slow_down(model: nn.Module) -> None:
    """Undoes `speed_up`; a model that was not sped up passes unchanged."""
    report = _REPORTS.get(model)
    if report is not None:
        report.undo()


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Runs a model inside as PEFT alone would; see `SpeedReport.plain`."""
    report = _REPORTS.get(model)
    if report is None:
        yield
    else:
        with report.plain():
            yield


def _forgetting(model: ReferenceType[nn.Module]) -> Callable[[], object]:
    """A report must not keep its model alive."""

    def forget() -> None:
        alive = model()
        if alive is not None:
            _REPORTS.pop(alive, None)

    return forget


def _prepare_compiler(
    model: nn.Module,
    memory_budget: float | None,
    choices: Choices,
    restore: list[Callable[[], object]],
) -> None:
    """Sets what torch keeps globally; `restore` takes it back."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    before = dynamo.recompile_limit
    if before < RECOMPILE_LIMIT:
        dynamo.recompile_limit = RECOMPILE_LIMIT
        restore.append(lambda: setattr(dynamo, "recompile_limit", before))
    if memory_budget is not None:
        budget = functorch.activation_memory_budget
        functorch.activation_memory_budget = memory_budget
        restore.append(lambda: setattr(functorch, "activation_memory_budget", budget))
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False) is True:
        config.use_cache = False
        choices.record(
            "model.use_cache", False, "a cache of keys and values would keep blocks uncompiled"
        )
        restore.append(lambda: setattr(config, "use_cache", True))


def _replace_attention(
    model: nn.Module, choices: Choices, restore: list[Callable[[], object]]
) -> None:
    """Replaces an attention that is far slower than ours, as training does; `restore` undoes it."""
    if attention_installed(model):
        return  # by training, or by the user
    how = install_attention(model)
    if how is not None:
        choices.record("model.attention", how, "the model's own makes every score")
        again = ref(model)  # a report must not keep its model alive

        def undo() -> None:
            alive = again()
            if alive is not None:
                uninstall_attention(alive)

        restore.append(undo)


def _modules(
    adapted: Mapping[str, nn.Module],
    groups: list[Group],
    refused: Mapping[str, str],
    how: str,
    regions: Mapping[str, nn.Module],
    why: str,
) -> list[ModuleSpeed]:
    """Returns a line for each adapted module."""
    group_of = {path: group for group in groups for path in group.paths}
    found = []
    for path, layer in adapted.items():
        group = group_of.get(path)
        within = any(path.startswith(f"{region}.") for region in regions)
        bits = stored_bits(_base(layer))
        if group is None or group.way == "plain":
            reason = refused[path] if group is None else group.reason
            if asks_fp8(_base(layer)):
                reason += "; its products are 16 bit, though float8 was asked for"
            paths = [] if group is None else group.paths
            way: SpeedWay = "compiled only" if within else "plain"
            found.append(ModuleSpeed(path, way, reason, bits, paths))
            continue
        if group.way == "grouped":
            shared = "is shared" if len(group.paths) > 1 else "takes the gathered weight"
            reason = f"{group.reason}: the base's product {shared}, LoRA beside it"
        elif len(group.paths) > 1:
            reason = f"LoRA inside one product of {len(group.paths)}: {how}"
        else:
            reason = "LoRA inside the base's product"
            reason += "" if how == WATCHED else f"; not grouped: {how}"
        if asks_fp8(_base(layer)):
            reason += "; expanded to float8"
        found.append(ModuleSpeed(path, group.way, reason, bits, group.paths))
    return found


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
