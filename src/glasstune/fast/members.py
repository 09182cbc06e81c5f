"""The forward of an adapted layer that asks its group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glasstune.adapters.lora_layers import add_adapters
from glasstune.fast.group import Group


class Member:
    """A layer's place in its group; kept in the layer beside its `forward`.

    A copy or a pickle of the model has none, and PEFT's own forward runs: a group belongs to one
    model. It is no callable itself, since torch.compile would make a graph for each object that
    it sees called; a function is one for all layers.
    """

    def __init__(self, group: Group, index: int) -> None:
        self.group = group
        self.index = index

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _none, ()


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands in a LoRA layer's `forward`; the module tree and its hooks stay as they are.

    Args:
        self: The layer.
        x: Its input [..., i].
        *args: As PEFT's own forward takes.
        **kwargs: Likewise.
    """
    member: Member | None = self._glasstune_member
    if member is None or args or kwargs:  # adapter_names, alora_offsets: not the plain call
        return _plain(self, x, *args, **kwargs)
    group = member.group
    if torch.compiler.is_compiling():
        # In a region that someone else compiles nobody looks before the call.
        if not group.open:
            return _plain(self, x)
    elif not group.holds(x, member.index):
        group.leave()
        group.look()
    if group.way == "plain" or not group.takes(x):
        return _plain(self, x)
    out = group.take(x, member.index)
    return out if group.way == "wide" else add_adapters(self, x, out)


def _plain(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = type(layer).forward(layer, x, *args, **kwargs)
    return out


def _none() -> None:
    return None


class HandBack:
    """Gives a group's bases their own memory before a state dict is made of one.

    Savers refuse tensors that are not contiguous; the next forward moves the weights again.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Runs as a state dict's pre-hook."""
        self.group.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[[nn.Module, str, bool], None]:
    return _nothing


def _nothing(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """What a copied module has in the place of `HandBack`."""


def attach(groups: Iterable[Group]) -> list[RemovableHandle]:
    """Puts members into the forwards of the groups' layers.

    Returns:
        Hooks to remove when they are detached.
    """
    hooks = []
    for group in groups:
        for index, layer in enumerate(group.layers):
            layer._glasstune_member = Member(group, index)
            layer.forward = MethodType(forward, layer)
            if group.kind in ("full", "fp8"):
                base: Any = layer.get_base_layer()
                hooks.append(base.register_state_dict_pre_hook(HandBack(group)))
    return hooks


def detach(groups: Iterable[Group], hooks: Iterable[RemovableHandle]) -> None:
    """Takes the members out again and gives the bases their own memory."""
    for hook in hooks:
        hook.remove()
    for group in groups:
        for layer in group.layers:
            forget(layer)
        group.release()


def forget(layer: nn.Module) -> None:
    """Takes our forward out of a layer, also out of a copy that has no group."""
    if "_glasstune_member" in layer.__dict__:
        del layer._glasstune_member
    if _is_ours(layer):
        del layer.forward


@contextmanager
def members_out(groups: Iterable[Group]) -> Iterator[None]:
    """Runs PEFT's own forwards inside; the bases' weights stay where they are."""
    held: list[nn.Module] = []
    for group in groups:
        group.leave()
        for layer in group.layers:
            if _is_ours(layer):
                held.append(layer)
                del layer.forward
    try:
        yield
    finally:
        for layer in held:
            layer.forward = MethodType(forward, layer)


def _is_ours(layer: nn.Module) -> bool:
    return getattr(layer.__dict__.get("forward"), "__func__", None) is forward
