"""The first-step gate: proves that every trained tensor learns, from its gradient.

It reads gradients, not motion alone: weight decay moves a tensor whose gradient is zero, and a
first learning rate of zero leaves a healthy one in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glasstune.core.findings import Finding, Severity

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from glasstune.core.batch import MicroBatch

PARTNERS = (
    ("lora_A", "lora_B"),
    ("lora_B", "lora_A"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_embedding_B", "lora_embedding_A"),
)
UPDATES_WATCHED = 2


@dataclass(slots=True)
class TensorState:
    """What the gate has seen of one trained tensor.

    Args:
        host: Path of the module that must be called for it to get a gradient.
        called: Whether that module ran.
        has_gradient: Whether `.grad` was ever not None.
        finite: Whether every gradient was finite.
        nonzero: Whether any gradient had a nonzero entry.
        excused: Whether its gradient must be zero because its partner was zero.
        in_optimizer: Whether an optimiser group holds it.
        moved: Whether it changed by more than weight decay explains.
    """

    host: str
    called: bool = False
    has_gradient: bool = False
    finite: bool = True
    nonzero: bool = False
    excused: bool = False
    in_optimizer: bool = False
    moved: bool = False


class FirstStepGate:
    """Watches the first two updates whose learning rate is above zero (a `StepHook`).

    Args:
        model: The model; its trained tensors are those that require a gradient now.
        mode: `stop` makes a dead tensor an error, `warn` a warning.
        allow: Glob patterns of tensor names that may stay dead.
    """

    def __init__(self, model: nn.Module, mode: str = "stop", allow: Sequence[str] = ()) -> None:
        self.mode = mode
        self.allow = tuple(allow)
        self.parameters = {
            name: value for name, value in model.named_parameters() if value.requires_grad
        }
        self.states = {name: TensorState(host_path(model, name)) for name in self.parameters}
        self.updates = 0
        self.terms: set[str] = set()
        self.done = False
        self._before: dict[str, Tensor] = {}
        self._decay: dict[int, float] = {}
        self._handles = self._watch_calls(model)

    def _watch_calls(self, model: nn.Module) -> list[RemovableHandle]:
        by_host: dict[str, list[TensorState]] = {}
        for state in self.states.values():
            by_host.setdefault(state.host, []).append(state)
        handles = []
        for path, states in by_host.items():

            def note(*_: Any, states: list[TensorState] = states) -> None:
                for state in states:
                    state.called = True

            handles.append(model.get_submodule(path).register_forward_pre_hook(note))
        return handles

    def before_update(self, step: int) -> None:
        """Remembers the values of the trained tensors."""
        if not self.done:
            self._before = {name: value.detach().clone() for name, value in self.parameters.items()}

    def before_backward(
        self, step: int, terms: Mapping[str, tuple[float, Tensor]], batch: MicroBatch
    ) -> None:
        """Remembers which terms with a weight above zero took part."""
        self.terms.update(name for name, (scale, _) in terms.items() if scale != 0)

    def after_backward(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Reads every gradient at one host copy."""
        if self.done:
            return
        held = {id(value): group for group in optimizer.param_groups for value in group["params"]}
        self._decay = {key: group.get("weight_decay", 0.0) for key, group in held.items()}
        names = [name for name, value in self.parameters.items() if value.grad is not None]
        if names:
            # The largest absolute value, not the 2-norm: that overflows at 1e20 and vanishes at
            # 1e-30 in fp32.
            grads = [self.parameters[name].grad for name in names]
            largest = torch.stack([grad.abs().max() for grad in grads if grad is not None]).tolist()
            for name, value in zip(names, largest, strict=True):
                state = self.states[name]
                state.has_gradient = True
                state.finite &= value == value and value != float("inf")
                state.nonzero |= value != 0
        for name, value in self.parameters.items():
            state = self.states[name]
            state.in_optimizer = id(value) in held
            partner = self._partner(name)
            state.excused = partner is not None and not bool(self._before[partner].any())

    def _partner(self, name: str) -> str | None:
        for mine, other in PARTNERS:
            partner = name.replace(f".{mine}.", f".{other}.")
            if partner != name and partner in self.parameters:
                return partner
        return None

    def after_update(self, step: int, model: nn.Module, learning_rate: float) -> Sequence[Finding]:
        """Judges; returns nothing while all is well."""
        if self.done or not self.terms:
            return ()
        for name, value in self.parameters.items():
            # On a zero gradient AdamW only shrinks by the decay.
            decay = self._decay.get(id(value), 0.0)
            still = self._before[name] * (1 - learning_rate * decay)
            self.states[name].moved |= not torch.equal(value.detach(), still)
        if learning_rate > 0:
            self.updates += 1
        final = self.updates >= UPDATES_WATCHED
        findings = [
            finding
            for name in self.parameters
            if not any(fnmatch(name, pattern) for pattern in self.allow)
            and (finding := self._judge(name, final)) is not None
        ]
        if final or any(finding.severity == "error" for finding in findings):
            self.close()
        return findings if final else [item for item in findings if item.severity != "info"]

    def _judge(self, name: str, final: bool) -> Finding | None:
        state = self.states[name]
        severity: Severity = "error" if self.mode == "stop" else "warning"
        fix = "audit.gate_allow takes a glob for tensors that may stay dead"
        if not state.called:
            return Finding(
                "gate_not_called",
                "info",
                name,
                f"its module {state.host} has not run yet, so it has no gradient",
                "nothing, where it is an expert without tokens; else check the model's forward",
            )
        if not state.in_optimizer:
            text = "requires a gradient but is in no optimiser group"
        elif not state.has_gradient:
            text = "has no gradient although its module ran"
        elif not state.finite:
            text = "has a gradient with NaN or Inf"
        elif not state.nonzero and self.terms == {"kl_to_base"}:
            return None  # at B = 0 the tuned model is the base: a zero gradient is the truth
        elif not state.nonzero and (final or not state.excused):
            text = "has a gradient that is exactly zero"
            if state.excused:
                text += ", as has its partner: both are zero, so neither can ever move"
        elif final and not state.moved:
            text = "has a gradient but its value did not change"
        else:
            return None
        return Finding("gate_dead_tensor", severity, name, f"{name} {text}", fix)

    def close(self) -> None:
        """Removes the hooks and frees the copies."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._before = {}
        self.done = True


def host_path(model: nn.Module, name: str) -> str:
    """Path of the module whose call should reach a parameter.

    PEFT keeps `lora_A` in a `ModuleDict` and `lora_embedding_A` in a `ParameterDict` of the
    adapted layer; the layer runs even where an adapter inside it is skipped, so the layer is
    what must be watched.
    """
    path = name.rpartition(".")[0]
    parts = path.split(".") if path else []
    for index in range(len(parts)):
        module = model.get_submodule(".".join(parts[: index + 1]))
        if isinstance(module, (nn.ModuleDict, nn.ParameterDict)):
            return ".".join(parts[:index])
    return path
