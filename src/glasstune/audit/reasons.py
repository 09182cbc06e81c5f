"""Why a parameter got no gradient, or a zero one: one list, asked in one order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from glasstune.audit.breaks import Break
from glasstune.audit.calls import CallLog, ModuleCalls
from glasstune.audit.peft_names import AdapterState, adapter_of, adapter_state
from glasstune.core.gradients import Reached, Reason


@dataclass(slots=True)
class Evidence:
    """What an audit knows of one parameter.

    Args:
        name: As `named_parameters` has it.
        tensor: The parameter as the model holds it now.
        owners: (module path, attribute) of every place that holds it.
        arrivals: How often a backward of the audit brought it a gradient.
        arrived: Norm of what came, where something did.
        reached: What the terms' graphs say together; None without terms.
        compiled: Whether a graph held a compiled region.
        no_graph: Why a loss had no graph; empty where none lacked one.
        backward: Whether any backward was seen.
        broken: Where its road ends, where that was looked for.
    """

    name: str
    tensor: Tensor
    owners: Sequence[tuple[str, str]]
    arrivals: int
    arrived: float | None
    reached: Reached | None
    compiled: bool
    no_graph: str
    backward: bool
    broken: Break | None


def why_frozen(model: nn.Module, name: str, tensor: Tensor) -> Reason:
    """Why a parameter needs no gradient: PEFT's switches, a packed weight, or the user."""
    adapter = adapter_of(model, name)
    if adapter is not None:
        path, key = adapter
        state = adapter_state(model.get_submodule(path))
        reason = None if state is None else _switched_off(state, path, key, None)
        if reason is not None:
            return reason
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        kind = str(tensor.dtype).removeprefix("torch.")
        return Reason("packed", f"a packed {kind} weight cannot need a gradient", _owner(name))
    return Reason("frozen", "requires_grad is False", _owner(name))


def why_none(model: nn.Module, log: CallLog, e: Evidence) -> Reason:
    """Why no gradient is there although one is asked for."""
    return (
        _about_the_tensor(e)
        or _about_the_backward(e)
        or _about_the_calls(model, log, e)
        or _about_the_road(log, e)
    )


def _about_the_tensor(e: Evidence) -> Reason | None:
    if e.tensor.is_leaf:
        return None
    made_by = type(e.tensor.grad_fn).__name__ if e.tensor.grad_fn is not None else "an operation"
    return Reason(
        "not_a_leaf",
        f"it is no leaf but the result of {made_by}: its gradient passes through to what it was "
        "computed from and is not kept in .grad",
        _owner(e.name),
    )


def _about_the_backward(e: Evidence) -> Reason | None:
    if e.no_graph:
        return Reason("loss_without_graph", e.no_graph)
    if e.arrivals:
        size = "" if e.arrived is None else f" (norm {e.arrived:.3g})"
        return Reason(
            "consumed",
            f"a gradient arrived{size} but .grad was set to None or zero before the audit ended: "
            "zero_grad, or a step that frees gradients",
            _owner(e.name),
        )
    if not e.backward and (e.reached is True or e.reached is None):
        return Reason("no_backward", "no backward ran inside the audit", _owner(e.name))
    if e.reached is True:
        return Reason(
            "reached_without_gradient",
            "a term's graph leads to it, but the backward that ran brought it none: the term was "
            "not part of it, or a custom backward returned None",
            _owner(e.name),
        )
    return None


def _about_the_calls(model: nn.Module, log: CallLog, e: Evidence) -> Reason | None:
    paths = [_callable_owner(model, path) for path, _ in e.owners]
    hidden = e.compiled and (e.reached == "unknown" or not log.seen)
    if any(log.in_compiled_region(path) for path in paths) or (
        hidden and not any(path in log.calls for path in paths)
    ):
        return Reason(
            "inside_compiled_region",
            "it lies inside a region of torch.compile, where the audit cannot see; audit the "
            "model without torch.compile",
            _owner(e.name),
        )
    called = [(path, log.calls[path]) for path in paths if path in log.calls]
    used = e.broken is not None and e.broken.last is not None
    if not called and not used:
        return _never_called(model, log, e, paths[0])
    if any(calls.with_grad for _, calls in called) or used:
        return _another_tensor(called, e)
    path, calls = called[0]
    if any(c.reentrant for _, c in called):
        if any(c.recomputed for _, c in called):
            return Reason(
                "lost_in_reentrant_checkpoint",
                "its module was recomputed inside reentrant checkpointing, but its gradient was "
                "lost in that region, where the audit cannot see; use use_reentrant=False to see",
                path,
                calls.no_grad_line,
            )
        if e.reached == "unknown" and not e.backward:
            return Reason(
                "inside_reentrant_checkpoint",
                "it lies inside reentrant checkpointing: unknown until a backward ran",
                path,
                calls.no_grad_line,
            )
        return Reason(
            "reentrant_without_input_gradient",
            "its module ran only inside reentrant checkpointing whose inputs need no gradient, so "
            "the region was never recomputed with gradients on; call enable_input_require_grads() "
            "or use use_reentrant=False",
            path,
            calls.no_grad_line,
        )
    mode = "inference_mode" if calls.inference else "no_grad"
    return Reason(
        mode, f"its module was called only under {mode}", path, calls.no_grad_line or calls.line
    )


def _never_called(model: nn.Module, log: CallLog, e: Evidence, path: str) -> Reason:
    if not log.seen:
        return Reason(
            "calls_not_seen",
            "no call of any module was seen: the model was not run inside the audit, or from "
            "inside torch.compile",
            path,
        )
    adapter = adapter_of(model, e.name)
    if adapter is not None:
        host, key = adapter
        calls = log.calls.get(host)
        if calls is not None and calls.adapter is not None:
            reason = _switched_off(calls.adapter, host, key, calls.line)
            if reason is not None:
                return reason
    parent = path
    while parent and parent not in log.calls:
        parent = parent.rpartition(".")[0]
    calls = log.calls.get(parent)
    line = None if calls is None else calls.line
    inside = f" although {parent or 'the model'} was" if calls is not None else ""
    if calls is not None and any(part.startswith("expert") for part in path.split(".")):
        text = f"its module was never called{inside}: no token was routed to this expert"
        return Reason("expert_without_tokens", text, path, line)
    return Reason("module_not_called", f"its module {path} was never called{inside}", path, line)


def _switched_off(state: AdapterState, path: str, key: str, line: str | None) -> Reason | None:
    if state.disabled:
        return Reason("adapter_disabled", f"the adapters of {path} are disabled", path, line)
    if key not in state.active:
        active = ", ".join(state.active) or "none"
        text = f"adapter {key!r} is not active at {path} (active: {active})"
        return Reason("adapter_inactive", text, path, line)
    if state.merged:
        return Reason(
            "adapter_merged", f"the adapter is merged into the weight of {path}", path, line
        )
    return None


def _another_tensor(called: Sequence[tuple[str, ModuleCalls]], e: Evidence) -> Reason | None:
    """The module ran, but with another tensor or with this one frozen."""
    frozen: Reason | None = None
    for path, attribute in e.owners:
        calls = dict(called).get(path)
        if calls is None or attribute not in calls.parameters:
            continue
        tensor, needed = calls.parameters[attribute]
        if tensor is e.tensor and needed:
            return None
        if tensor is not e.tensor:
            return Reason(
                "replaced",
                f"{path or 'the model'} was called while it held another tensor as {attribute}: "
                "the parameter was replaced after the forward, or swapped for it",
                path,
                calls.line,
            )
        frozen = Reason(
            "frozen_at_call", "requires_grad was False when its module ran", path, calls.line
        )
    return frozen


def _about_the_road(log: CallLog, e: Evidence) -> Reason:
    broken = e.broken
    owner = e.owners[0][0]
    calls = log.calls.get(owner)
    line = None if calls is None else calls.line
    if e.reached == "unknown":
        return Reason(
            "unknown",
            "it may lie behind a compiled region or reentrant checkpointing, where the graph does "
            "not tell",
            owner,
            line,
        )
    if broken is None or broken.last is None:
        return Reason(
            "not_in_output",
            f"{owner or 'the model'} was called, but its output does not carry this parameter's "
            "gradient: it is not used there, or only detached",
            owner,
            line,
        )
    last, cut = broken.last, broken.cut
    last_name = last.path or "the model"
    if cut is not None:
        how = (
            "got that output without its gradient (detach or no_grad)"
            if broken.same
            else "is the first module after it whose input has none ("
            + ("argmax, item or an integer type" if cut.integers_in else "detach, argmax or item")
            + ")"
        )
        return Reason(
            "detached",
            f"the output of {last_name} carries its gradient, {cut.path or 'the model'} {how}",
            cut.path,
            cut.line,
        )
    text = f"the output of {last_name} carries its gradient, but no loss comes from it"
    return Reason("leads_to_no_loss", text, last.path, last.line)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _callable_owner(model: nn.Module, path: str) -> str:
    """Path of the module whose call uses a parameter: parameter containers are never called."""
    while path and isinstance(
        model.get_submodule(path), (nn.ParameterDict, nn.ParameterList, nn.ModuleDict)
    ):
        path = path.rpartition(".")[0]
    return path


def why_zero(
    partner: str | None,
    partner_zero: bool,
    value_zero: bool,
    weights: Sequence[float],
    norms: Sequence[float | None],
) -> Reason:
    """Why a gradient is exactly zero.

    Args:
        partner: The other factor of a low-rank product (`lora_B`), where there is one.
        partner_zero: Whether that is exactly zero.
        value_zero: Whether the parameter itself is.
        weights: Of the terms that reach it.
        norms: Their norms here.
    """
    if partner is not None and partner_zero:
        if value_zero:
            return Reason(
                "both_zero",
                f"it and its partner {partner} are both exactly zero, so neither can ever move",
            )
        text = f"its partner {partner} is exactly zero, as at the first step: healthy"
        return Reason("partner_zero", text)
    if weights and not any(weights):
        return Reason("weight_zero", "every term that reaches it has the weight 0")
    if any(norm for norm in norms):
        return Reason("terms_cancel", "the terms' gradients here cancel exactly")
    if partner is not None and value_zero:
        text = (
            "it is exactly zero, so the adapter is still untouched, and the loss is at a minimum "
            "there, as a divergence from the base model alone is"
        )
        return Reason("untouched_adapter", text)
    return Reason(
        "zero_gradient",
        "the loss does not change with it here: a dead activation, a mask, rows that were not "
        "used, or a minimum",
    )
