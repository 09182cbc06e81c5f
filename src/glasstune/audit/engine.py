"""Gradients of each term by itself, without a trace in the training.

Plain engine: one `torch.autograd.grad(loss, parameters, retain_graph=True)` a term. It leaves
`.grad`, accumulate hooks and post-accumulate hooks alone and works with non-reentrant
checkpointing. Tensor hooks of the user's run as in a backward, so that a hook that masks or scales
a gradient holds for its terms too.

Reentrant checkpointing refuses that call (or silently gives None), so on such steps each term runs
a real `.backward()` while every `.grad` is put aside and post-accumulate hooks are switched off.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glasstune.core.errors import InputError

Gradients = list[Tensor | None]


class CannotSplit(Exception):
    """The graph cannot be run once a term; its text says why."""


def by_grad(loss: Tensor, parameters: Sequence[Tensor], name: str) -> Gradients:
    """Gradients of one loss by `torch.autograd.grad`; None where it does not lead.

    Raises:
        InputError: `backward_before_terms`: the graph is gone.
        CannotSplit: A compiled region keeps nothing for a second pass.
    """
    try:
        return list(
            torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
        )
    except RuntimeError as error:
        raise _explained(error, name) from error


def by_backward(
    loss: Tensor, parameters: Sequence[Tensor], leaves: Sequence[Tensor], name: str
) -> Gradients:
    """Gradients of one loss by `.backward()`, with every `.grad` as it was before.

    Args:
        loss: Scalar, with graph.
        parameters: Whose gradients are wanted.
        leaves: Every leaf that the backward may write to, parameters included.
        name: Of the term.

    Raises:
        InputError: `backward_before_terms`: the graph is gone.
        CannotSplit: A compiled region keeps nothing for a second pass.
    """
    unique = {id(leaf): leaf for leaf in (*parameters, *leaves) if leaf.is_leaf}.values()
    saved = [(leaf, leaf.grad, _take_hooks(leaf)) for leaf in unique]
    for leaf in unique:
        leaf.grad = None
    try:
        torch.autograd.backward(loss, retain_graph=True)
        return [parameter.grad if parameter.is_leaf else None for parameter in parameters]
    except RuntimeError as error:
        raise _explained(error, name) from error
    finally:
        for leaf, grad, hooks in saved:
            leaf.grad = grad
            if hooks:
                leaf._post_accumulate_grad_hooks.update(hooks)


def _take_hooks(leaf: Tensor) -> dict[Any, Any]:
    hooks = getattr(leaf, "_post_accumulate_grad_hooks", None)
    if not hooks:
        return {}
    taken = dict(hooks)
    hooks.clear()
    return taken


def _explained(error: RuntimeError, name: str) -> Exception:
    text = str(error)
    if "backward through the graph a second time" in text:
        return InputError(
            "backward_before_terms",
            f"the graph of loss term {name!r} was freed by a backward before terms() saw it",
            where=name,
            fix="call audit.terms() after the losses and before .backward()",
        )
    if "donated buffers" in text:
        return CannotSplit(
            "a compiled region gave its buffers away and can run only one backward; set "
            "torch._functorch.config.donated_buffer = False before compiling, or audit the model "
            "without torch.compile"
        )
    return error


@contextmanager
def unchanged(written: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Puts random generators and buffers back as they were.

    A recomputed region draws its dropout again, and may count a batch again in its batch norm.

    Args:
        written: (module, name, buffer) of the buffers that this step's forward has written.
    """
    python_state = random.getstate()
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    cpu_state = torch.get_rng_state()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    copies = [(module, name, buffer, buffer.detach().clone()) for module, name, buffer in written]
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        for module, name, buffer, copy in copies:
            # .data has a version counter of its own: what saved the buffer does not object.
            buffer.data.copy_(copy)
            module._buffers[name] = buffer
