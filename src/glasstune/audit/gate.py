"""The first-step gate: proves that every trained tensor learns, from its gradient.

It reads gradients, not motion alone: weight decay moves a tensor whose gradient is zero, and a
first learning rate of zero leaves a healthy one in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    from glasstune.core.protocols import Exchange

PARTNERS = (
    ("lora_A", "lora_B"),
    ("lora_B", "lora_A"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_embedding_B", "lora_embedding_A"),
)
UPDATES_WATCHED = 2
"""Updates with a learning rate above zero in which a tensor's module ran, until it is judged."""
UPDATES_WAITED = 50
"""Updates after which the gate no longer waits for tensors that were never reached."""
KL = "kl_to_base"
TOKEN_ROWS = "trainable_tokens_delta"


@dataclass(slots=True)
class TensorState:
    """What the gate has seen of one trained tensor.

    Args:
        host: Path of the module that must be called for it to get a gradient.
        called: Whether that module ever ran.
        called_now: Whether it ran in this update.
        updates: Updates counted for it.
        has_gradient: Whether `.grad` was ever not None.
        finite: Whether every gradient was finite.
        nonzero: Whether any gradient had a nonzero entry.
        excused: Whether its gradient must be zero because its partner was zero.
        in_optimizer: Whether an optimiser group holds it.
        moved: Whether it changed by more than weight decay explains.
        named: Whether it was already named as waited for.
    """

    host: str
    called: bool = False
    called_now: bool = False
    updates: int = 0
    has_gradient: bool = False
    finite: bool = True
    nonzero: bool = False
    excused: bool = False
    in_optimizer: bool = False
    moved: bool = False
    named: bool = False


class FirstStepGate:
    """Watches each tensor's first two updates with a learning rate above zero (a `StepHook`).

    A tensor whose module does not run (an expert without tokens) is named and waited for; so are
    trained rows of an embedding whose tokens have not come yet.

    Args:
        model: The model; its trained tensors are those that require a gradient now.
        mode: `stop` makes a dead tensor an error, `warn` a warning.
        allow: Glob patterns of tensor names that may stay dead.
        calls_seen: Whether modules' calls can be seen; inside a region of torch.compile they
            cannot, and a tensor without a gradient is then dead, not waited for.
        look: Runs the forwards of an update's micro-batches so that calls are seen. It is asked
            where calls are hidden and a tensor got no gradient.
        exchange: The ranks that share each update: a module that ran on one of them has run, so
            all come to one verdict.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str = "stop",
        allow: Sequence[str] = (),
        *,
        calls_seen: bool = True,
        look: Callable[[Sequence[MicroBatch]], None] | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.exchange = exchange
        self.mode = mode
        self.calls_seen = calls_seen or look is not None
        self.look = None if calls_seen else look
        self._batches: list[MicroBatch] = []
        self.parameters = {
            name: value for name, value in model.named_parameters() if value.requires_grad
        }
        self.states = {
            name: TensorState(host_path(model, name))
            for name in self.parameters
            if not any(fnmatch(name, pattern) for pattern in allow)
        }
        self.updates = 0
        self.done = False
        self._terms: set[str] = set()
        self._before: dict[str, Tensor] = {}
        self._decay: dict[int, float] = {}
        self._handles = self._watch_calls(model) if calls_seen else []

    def _watch_calls(self, model: nn.Module) -> list[RemovableHandle]:
        by_host: dict[str, list[TensorState]] = {}
        for state in self.states.values():
            by_host.setdefault(state.host, []).append(state)
        handles = []
        for path, states in by_host.items():

            def note(*_: Any, states: list[TensorState] = states) -> None:
                for state in states:
                    state.called = state.called_now = True

            handles.append(model.get_submodule(path).register_forward_pre_hook(note))
        return handles

    def before_update(self, step: int) -> None:
        """Remembers the values of the tensors that are still watched, and of their partners."""
        if self.done:
            return
        self._terms = set()
        self._batches = []
        for state in self.states.values():
            state.called_now = not self.calls_seen
            state.called |= state.called_now
        partners = (self._partner(name) for name in self.states)
        wanted = {*self.states, *(name for name in partners if name is not None)}
        self._before = {name: self.parameters[name].detach().clone() for name in wanted}

    def before_backward(
        self, step: int, terms: Mapping[str, tuple[float, Tensor]], batch: MicroBatch
    ) -> None:
        """Remembers which terms with a weight above zero take part in this update."""
        self._terms.update(name for name, (scale, _) in terms.items() if scale != 0)
        if self.look is not None and not self.done:
            self._batches.append(batch)

    def after_backward(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Reads every gradient at one host copy."""
        if self.done:
            return
        held = {id(value): group for group in optimizer.param_groups for value in group["params"]}
        self._decay = {key: group.get("weight_decay", 0.0) for key, group in held.items()}
        names = [name for name in self.states if self.parameters[name].grad is not None]
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
        self._look_at_hidden_calls(model, names)
        self._share_calls()
        for name, state in self.states.items():
            state.in_optimizer = id(self.parameters[name]) in held
            partner = self._partner(name)
            state.excused = partner is not None and not bool(self._before[partner].any())

    def _look_at_hidden_calls(self, model: nn.Module, reached: Sequence[str]) -> None:
        """A gradient tells of a call; where one is missing, the forwards are run once more."""
        if self.look is None:
            return
        for name in reached:
            self.states[name].called = self.states[name].called_now = True
        if len(reached) == len(self.states):
            return
        handles = self._watch_calls(model)
        try:
            self.look(self._batches)
        finally:
            for handle in handles:
                handle.remove()
            self._batches = []

    def _share_calls(self) -> None:
        if self.exchange is None or self.exchange.size == 1:
            return
        mine = [name for name, state in self.states.items() if state.called_now]
        for called, terms in self.exchange.gather((mine, self._terms)):
            self._terms |= terms
            for name in called:
                self.states[name].called = self.states[name].called_now = True

    def _partner(self, name: str) -> str | None:
        for mine, other in PARTNERS:
            partner = name.replace(f".{mine}.", f".{other}.")
            if partner != name and partner in self.parameters:
                return partner
        return None

    def after_update(self, step: int, model: nn.Module, learning_rate: float) -> Sequence[Finding]:
        """Judges; returns nothing while all is well."""
        if self.done or not self._terms:
            return ()
        # At B = 0 the tuned model is the base, and the gradient of kl_to_base alone is zero.
        learns = self._terms != {KL}
        self.updates += learning_rate > 0
        findings: list[Finding] = []
        for name, state in list(self.states.items()):
            if state.called_now:
                value = self.parameters[name]
                # On a zero gradient AdamW only shrinks by the decay.
                decay = self._decay.get(id(value), 0.0)
                still = self._before[name] * (1 - learning_rate * decay)
                state.moved |= not torch.equal(value.detach(), still)
                state.updates += learning_rate > 0 and learns
                final = state.updates >= UPDATES_WATCHED
                text = self._dead(state, final, learns)
                waits = TOKEN_ROWS in name and state.has_gradient and not state.nonzero
                if text and not (waits and state.finite and state.in_optimizer):
                    findings.append(self._finding(name, text))
                    del self.states[name]
                elif final and not waits:
                    del self.states[name]
        findings.extend(self._waited_for())
        if (
            not self.states
            or self.updates >= UPDATES_WAITED
            or any(finding.severity == "error" for finding in findings)
        ):
            self.close()
        return findings

    def _dead(self, state: TensorState, final: bool, learns: bool) -> str:
        if not state.in_optimizer:
            return "requires a gradient but is in no optimiser group"
        if not state.has_gradient:
            if self.calls_seen:
                return "has no gradient although its module ran"
            return "has no gradient, and torch.compile hides whether its module ran"
        if not state.finite:
            return "has a gradient with NaN or Inf"
        if not state.nonzero and learns and (final or not state.excused):
            text = "has a gradient that is exactly zero"
            both = ", as has its partner: both are zero, so neither can ever move"
            return text + both if state.excused else text
        if state.nonzero and final and not state.moved:
            return "has a gradient but its value did not change"
        return ""

    def _finding(self, name: str, text: str) -> Finding:
        severity: Severity = "error" if self.mode == "stop" else "warning"
        fix = "audit.gate_allow takes a glob for tensors that may stay dead"
        return Finding("gate_dead_tensor", severity, name, f"{name} {text}", fix)

    def _waited_for(self) -> list[Finding]:
        """Names, once, what was not reached by the time that everything else was judged."""
        found = []
        for name, state in self.states.items() if self.updates >= UPDATES_WATCHED else ():
            if state.named or (state.called and TOKEN_ROWS not in name):
                continue
            state.named = True
            code, says, fix = "gate_not_called", f"its module {state.host} has not run yet", ""
            if state.called:
                code, says = "gate_no_tokens", "none of its tokens has come yet"
            else:
                fix = (
                    "nothing, where it is an expert without tokens; else check the model's forward"
                )
            found.append(Finding(code, "info", name, f"{says}, so it has no gradient", fix))
        return found

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
