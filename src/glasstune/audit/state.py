"""What an audit holds while it is open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from glasstune.audit.breaks import Break
from glasstune.audit.norms import dense, tensor_stats
from glasstune.core.gradients import Reached


@dataclass(slots=True)
class Watched:
    """One parameter.

    Args:
        name: As `named_parameters` had it when it was first seen.
        tensor: The parameter.
        handle: Of the hook on it; None where it needed no gradient.
        arrivals: Gradients that came in the caller's own backward passes.
        order: Place of its first arrival among all arrivals.
        had: Whether `.grad` was there at the first arrival.
        before: Statistics of `.grad` then.
        first: Statistics of the first gradient that came; None where it is read at the end.
        total: Statistics of all that came, where several did and no term explains them.
        base: Copy of `.grad` then; kept only without terms.
        reached: Term to what its graphs said.
        gradients: Term to the sum of its gradients, without the weight.
        extra: Gradient through the terms' weights, where those are learned.
        residual: Σ w_i g_i (and `extra`) less what came.
        broken: Where its road to the loss ends.
        gram: float64 [K, K] of `gradients`, once the audit is closed.
        texts: What torch prints of it, where values are kept.
    """

    name: str
    tensor: Tensor
    handle: RemovableHandle | None = None
    arrivals: int = 0
    order: int = -1
    had: bool = False
    before: Tensor | None = None
    first: Tensor | None = None
    total: Tensor | None = None
    base: Tensor | None = None
    reached: dict[str, Reached] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    extra: Tensor | None = None
    residual: Tensor | None = None
    broken: Break | None = None
    gram: Tensor | None = None
    texts: dict[str, str] = field(default_factory=dict)

    def arrive(
        self, increment: Tensor, order: int, *, has_terms: bool, keep_text: bool, left_alone: bool
    ) -> None:
        """Notes a gradient before it is added to `.grad`.

        Args:
            increment: What comes.
            order: Number of this arrival among all.
            has_terms: Whether terms were given.
            keep_text: Whether `.grad` is kept as text.
            left_alone: Whether what came can be read from `.grad` at the end, where it was None.
        """
        self.arrivals += 1
        current = grad_of(self.tensor)
        if self.arrivals == 1:
            self.order = order
            self.had = current is not None
            self.before = None if current is None else tensor_stats(current)
            if not (left_alone and current is None):
                self.first = tensor_stats(increment)
            if current is not None and not has_terms:
                self.base = dense(current).clone()
            if keep_text:
                self.texts["grad_before"] = text_of(current)
        elif not has_terms and current is not None and self.first is not None:
            total = dense(current) + dense(increment)
            self.total = tensor_stats(total if self.base is None else total - self.base)
        if has_terms:
            self.add(increment, -1.0)

    def add(self, gradient: Tensor, factor: float) -> None:
        """Adds factor * gradient to the residual, in at least float32."""
        part = dense(gradient)
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        if self.residual is None:
            self.residual = part * factor
        else:
            self.residual.add_(part, alpha=factor)

    def collect(self, term: str, gradient: Tensor | None, weight: float) -> None:
        """Adds one term's gradient of one call."""
        if gradient is None:
            return
        held = self.gradients.get(term)
        # Not in place: autograd may give one tensor for two parameters, or an expanded one.
        self.gradients[term] = gradient.detach() if held is None else held + gradient
        self.add(gradient, weight)

    def release(self, keep_gradients: bool) -> None:
        """Frees what only the record needed."""
        self.residual = self.base = self.extra = self.broken = None
        self.before = self.first = self.total = None
        if not keep_gradients:
            self.gradients = {}

    def note_reach(self, term: str, reached: Reached) -> None:
        """Merges what one more call said: yes wins, then unknown."""
        held = self.reached.get(term, False)
        if reached is True or held is True:
            self.reached[term] = True
        elif "unknown" in (reached, held):
            self.reached[term] = "unknown"
        else:
            self.reached[term] = False

    def reached_at_all(self) -> Reached | None:
        """What all terms say together; None without terms."""
        if not self.reached:
            return None
        if any(value is True for value in self.reached.values()):
            return True
        return "unknown" if "unknown" in self.reached.values() else False


@dataclass(slots=True)
class TermState:
    """One term over all calls.

    Args:
        name: Its name.
        weight: As a number; the same in every call.
        losses: Detached losses.
        counts: What the caller said of the counts.
        fresh: Whether no forward has begun since it was given.
        arrivals: Gradients that had come when it was given.
        last: Node of the latest loss, to notice one that is given twice.
    """

    name: str
    weight: float
    losses: list[Tensor] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    fresh: bool = False
    arrivals: int = 0
    last: Any = None


def grad_of(tensor: Tensor) -> Tensor | None:
    """`.grad`, without the warning that torch gives for what is no leaf."""
    return tensor.grad if tensor.is_leaf or tensor.retains_grad else None


def text_of(tensor: Tensor | None) -> str:
    """A tensor as torch prints it, long ones abridged."""
    return "None" if tensor is None else str(tensor.detach())
