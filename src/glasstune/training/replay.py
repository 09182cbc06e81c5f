"""Forwards of training replayed as CUDA graphs, where a GPU would wait for their kernels.

Whether it would is measured: one forward is timed until Python has started its kernels, and until
they are done. Where these are nearly the same time, the GPU waited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from glasstune.core.choices import Choices
from glasstune.fast.graphs import GraphedForward
from glasstune.fast.report import SpeedReport
from glasstune.training.dropout import RowSeeds

SEEN_FIRST = 3
"""Forwards of a shape before one is timed: by then all is compiled."""

LAUNCH_BOUND = 0.7
"""Share of a forward's time that starting its kernels takes, from which on it is replayed."""

SHAPES = 2
"""Shapes that are captured: the usual batch and an epoch's last. Each holds its activations."""

Run = Callable[[Mapping[str, Any]], Tensor]


class Replays:
    """Runs forwards of training, replayed where that is faster.

    Forwards without gradients, of a model that is not in training, or that someone watches with
    module hooks run as ever.

    Args:
        model: The model, sped up and compiled.
        speed: What `speed_up` gave: where weights lie.
        parameters: Its trained tensors.
        rows: Seeds of the dropout, an input like others.
        choices: Where the decision is noted.
        say: Is told the decision.
    """

    def __init__(
        self,
        model: nn.Module,
        speed: SpeedReport,
        parameters: Sequence[Tensor],
        rows: RowSeeds,
        choices: Choices,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.speed, self.rows = model, speed, rows
        self.parameters = list(parameters)
        self.choices, self.say = choices, say
        self.decided: bool | None = None
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[Any, GraphedForward]] = {}
        self._hooks = _hooks(model)

    def __call__(self, run: Run, inputs: Mapping[str, Any]) -> Tensor:
        """Runs `run(inputs)`.

        Args:
            run: The backbone; the same function of its inputs, weights and `rows` each time.
            inputs: Tensors on the device and constants, nested in tuples.
        """
        if not self._may():
            return run(inputs)
        leaves, form = tree_flatten((dict(inputs), self.rows.seeds))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (form, tuple(_kind(leaf) for leaf in leaves))
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen <= SEEN_FIRST:
            return run(inputs)
        if self.decided is None:
            return self._timed(run, inputs)
        if key not in self._graphs and len(self._graphs) == SHAPES:
            return run(inputs)
        place = self._places()
        held = self._graphs.get(key)
        if held is None or held[0] != place:
            self._graphs.pop(key, None)
            if not self._capture(key, run, leaves, form, tensors):
                return run(inputs)
            held = self._graphs[key]
        return held[1](*tensors)

    def drop(self) -> None:
        """Forgets what was captured, and its memory."""
        self._graphs.clear()

    def _may(self) -> bool:
        if self.decided is False or not torch.is_grad_enabled() or not self.model.training:
            return False
        return _hooks(self.model) == self._hooks

    def _timed(self, run: Run, inputs: Mapping[str, Any]) -> Tensor:
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = run(inputs)
        launched = time.perf_counter() - start
        torch.cuda.synchronize()
        done = time.perf_counter() - start
        share = launched / done
        self._decide(
            share >= LAUNCH_BOUND,
            f"starting a forward's kernels took {launched * 1e3:.0f} of its {done * 1e3:.0f} ms "
            f"({'at least' if share >= LAUNCH_BOUND else 'less than'} {LAUNCH_BOUND:.0%})",
        )
        return out

    def _capture(
        self, key: Any, run: Run, leaves: list[Any], form: Any, tensors: list[Tensor]
    ) -> bool:
        def call(*given: Tensor) -> Tensor:
            rest = iter(given)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            inputs, seeds = tree_unflatten(filled, form)
            held, self.rows.seeds = self.rows.seeds, seeds
            try:
                return run(inputs)
            finally:
                self.rows.seeds = held

        torch.cuda.empty_cache()
        try:
            graphed = GraphedForward(call, tensors, self.parameters)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._decide(False, "there is no memory for the activations that a graph holds")
            return False
        self._graphs[key] = (self._places(), graphed)
        return True

    def _decide(self, on: bool, reason: str) -> None:
        self.decided = on
        self.choices.record("training.cuda_graphs", on, reason)
        if self.say is not None:
            self.say(f"training.cuda_graphs: {on} ({reason})")

    def _places(self) -> tuple[int, ...]:
        """Addresses of all that a graph reads: a saved state dict moves the wide weights."""
        found = [parameter.data_ptr() for parameter in self.parameters]
        for group in self.speed.groups:
            found.append(-1 if group.wide is None else group.wide.data_ptr())
            found += [base.weight.data_ptr() for base in group.bases]
            if group.home is not None:
                found += [tensor.data_ptr() for tensor in group.home.tensors()]
        return tuple(found)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _hooks(model: nn.Module) -> int:
    """Counts module hooks, which a replay would not call."""
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks)
        for part in model.modules()
    )
