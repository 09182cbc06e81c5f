"""The forward of an adapted layer that asks its group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from glasstune.adapters.lora_layers import add_adapters
from glasstune.fast.group import Group


class Member:
    """Stands in a LoRA layer's `forward`; the module tree and its hooks stay as they are.

    A copy or a pickle of the model has PEFT's own forward again: a group belongs to one model.
    """

    def __init__(self, group: Group, index: int) -> None:
        self.group = group
        self.index = index
        self.layer = group.layers[index]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output [..., n]."""
        group = self.group
        if args or kwargs:  # adapter_names, alora_offsets: not the plain call
            return self.plain(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            # In a region that someone else compiles nobody looks before the call.
            if not group.open:
                return self.plain(x)
        elif group.x is not x or group.taken[self.index]:
            group.look()
        if group.way == "plain" or not group.takes(x):
            return self.plain(x)
        out = group.take(x, self.index)
        return out if group.way == "wide" else add_adapters(self.layer, x, out)

    def plain(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own forward."""
        out: Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        layer = memo.get(id(self.layer))
        if layer is None:  # the layer alone is being copied from elsewhere
            return self
        return MethodType(type(layer).forward, layer)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.layer, "forward")


def attach(groups: Iterable[Group]) -> None:
    """Puts members into the forwards of the groups' layers."""
    for group in groups:
        for index, layer in enumerate(group.layers):
            layer.forward = Member(group, index)


def detach(groups: Iterable[Group]) -> None:
    """Takes the members out again and gives the bases their own memory."""
    for group in groups:
        for layer in group.layers:
            if isinstance(layer.__dict__.get("forward"), Member):
                del layer.forward
        group.release()


@contextmanager
def members_out(groups: Iterable[Group]) -> Iterator[None]:
    """Runs PEFT's own forwards inside; the bases' weights stay where they are."""
    held: list[tuple[nn.Module, Member]] = []
    for group in groups:
        group.leave()
        for layer in group.layers:
            member = layer.__dict__.get("forward")
            if isinstance(member, Member):
                held.append((layer, member))
                del layer.forward
    try:
        yield
    finally:
        for layer, member in held:
            layer.forward = member
