"""The first value that is not finite, between its finite neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasstune.audit.calls import Memory, in_backward, memory_of
from glasstune.audit.norms import dense
from glasstune.core.findings import Finding


@dataclass(frozen=True, slots=True)
class Bracket:
    """The first bad place and its finite neighbours in the order of things.

    Args:
        bad: Path or name.
        before: Nearest finite place before it; None where there is none.
        after: Nearest finite place after it; None where all the rest is bad too.
    """

    bad: str
    before: str | None
    after: str | None

    def text(self) -> str:
        """Returns the neighbours as a clause."""
        before = f"{self.before} before it is finite" if self.before else "nothing comes before it"
        after = f"{self.after} after it is finite" if self.after else "nothing after it is finite"
        return f"{before}, {after}"


def bracket(places: Sequence[tuple[str, bool]]) -> Bracket | None:
    """Finds the first place that is not finite.

    Args:
        places: (name, whether it is finite), in the order in which they were computed.

    Returns:
        The bracket, or None where all are finite.
    """
    for index, (name, finite) in enumerate(places):
        if finite:
            continue
        before = next((other for other, good in reversed(places[:index]) if good), None)
        after = next((other for other, good in places[index + 1 :] if good and other != name), None)
        return Bracket(name, before, after)
    return None


class OutputWatch:
    """Smallest and largest entry of each module's output, and of the gradient that comes to it."""

    def __init__(self) -> None:
        self.forward: list[tuple[str, Tensor]] = []
        self.backward: list[tuple[str, Tensor]] = []
        self.muted = False
        self._last: tuple[Memory, int, int] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def look(self, path: str, output: Tensor) -> None:
        """Looks at one output; one that its container passes on is not looked at again."""
        if self.muted or not output.numel() or output.layout != torch.strided:
            return
        number = -1 if output.grad_fn is None else output.grad_fn._sequence_nr()
        (memory,) = memory_of([output])
        last = self._last
        if last and (last[0].cdata, *last[1:]) == (memory.cdata, output.numel(), number):
            return
        self._last = (memory, output.numel(), number)
        if not in_backward():
            self.forward.append((path, _extremes(output)))
        if output.requires_grad:
            handle = output.register_hook(self._gradient(path))  # type: ignore[no-untyped-call]
            self._handles.append(handle)

    def _gradient(self, path: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not self.muted:
                self.backward.append((path, _extremes(gradient)))

        return hook

    def detach(self) -> None:
        """Removes the hooks; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _extremes(tensor: Tensor) -> Tensor:
    """Smallest and largest entry, [2]; NaN where there is one."""
    return torch.stack(torch.aminmax(dense(tensor)))


def whole_story(
    forward: Bracket | None, backward: Bracket | None, arrivals: Bracket | None
) -> list[Finding]:
    """The findings of an audit in which something was not finite."""
    found = []
    if forward is not None:
        found.append(
            Finding(
                "first_nonfinite_output",
                "error",
                forward.bad,
                f"the first NaN or Inf of the forward is in the output of {forward.bad}: "
                f"{forward.text()}",
                "look at its input's range and its weights; float16 overflows at 65,504",
            )
        )
    if backward is not None and forward is None:
        found.append(
            Finding(
                "first_nonfinite_output_gradient",
                "error",
                backward.bad,
                "the forward is finite; the first NaN or Inf of the backward is in the gradient at "
                f"the output of {backward.bad}: {backward.text()}",
                "look at what the loss does after it: a root, a division or a logarithm at zero",
            )
        )
    if arrivals is not None:
        found.append(
            Finding(
                "first_nonfinite_gradient",
                "error",
                arrivals.bad,
                f"the first parameter that got NaN or Inf is {arrivals.bad}: {arrivals.text()}",
                "drop the step; see the first bad output",
            )
        )
    return found
