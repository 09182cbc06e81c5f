"""A loss of named, weighted terms for the `compute_loss_func` of `transformers.Trainer` and TRL.

Shape letters: R rows of a micro-batch, L tokens of a row, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glasstune.core.batch import IGNORED
from glasstune.core.errors import InputError, RunError

TermFunction = Callable[..., Tensor]
TermSpec = float | TermFunction | tuple[float, TermFunction]


class Listener(Protocol):
    """Who wants the terms of each micro-batch before its backward: the callback."""

    def hear(self, terms: Mapping[str, tuple[float, Tensor]]) -> None:
        """Takes name -> (weight, the term's loss with graph)."""


listener: ContextVar[Listener | None] = ContextVar("glasstune_listener", default=None)
"""The callback of the Trainer that is inside an update now. A Trainer tells a loss function nothing
about itself, so this is how the two of one Trainer meet; each thread has its own."""


def next_token(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The Trainer's own loss of causal models, by the same function.

    Args:
        outputs: Has `logits` [R, L, V].
        labels: int64 [R, L], not shifted; -100 is not trained.
        num_items_in_batch: Trained tokens of the whole update; None = mean over these.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = logits_of(outputs)
    loss: Tensor = ForCausalLMLoss(
        logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch
    )
    return loss


def z_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Mean of the squared log of the softmax's denominator at trained positions.

    It keeps the logits from drifting (PaLM, https://arxiv.org/abs/2204.02311, section 5).
    """
    trained = labels[..., 1:] != IGNORED
    logits = logits_of(outputs)[..., :-1, :][trained.to(logits_of(outputs).device)]
    squares = logits.float().logsumexp(dim=-1).square()
    if num_items_in_batch is None:
        return squares.mean()
    return squares.sum() / num_items_in_batch


BUILT_IN: dict[str, TermFunction] = {"next_token": next_token, "z_loss": z_loss}


def logits_of(outputs: Any) -> Tensor:
    """The logits [R, L, V] of a model's output.

    Raises:
        RunError: It has none.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, Tensor):
        raise RunError(
            "no_logits",
            f"the model's output ({type(outputs).__name__}) has no logits",
            fix="write a function of your own for what this model returns",
        )
    return logits


@dataclass(frozen=True)
class Term:
    """One term, checked.

    Args:
        name: Its name in logs and audits.
        weight: Factor in the loss.
        function: Computes it.
        whole: Whether the function takes `num_items_in_batch` and divides by it itself.
    """

    name: str
    weight: float
    function: TermFunction
    whole: bool


def term_loss(terms: Mapping[str, TermSpec]) -> TermLoss:
    """Makes a `compute_loss_func` of named terms.

    A function of three arguments, `f(outputs, labels, num_items_in_batch)`, returns its sum over
    the micro-batch divided by `num_items_in_batch` (the trained tokens of the whole update; None
    where the Trainer does not know it: then a mean). A function of two, `f(outputs, labels)`,
    returns a mean over the micro-batch, which is then weighted by the micro-batch's share of the
    update's trained tokens. Either way gradient accumulation stays exact: the Trainer itself does
    not divide where a `compute_loss_func` is given.

    Args:
        terms: name -> function, (weight, function), or for the built-in names `next_token` and
            `z_loss` a weight alone.

    Returns:
        The callable; `GlasstuneCallback` of the same Trainer finds it by itself.

    Raises:
        InputError: No term, an unknown built-in, a wrong weight, something that is no function.
    """
    if not isinstance(terms, Mapping) or not terms:
        raise InputError(
            "no_terms",
            "term_loss needs at least one term",
            where="term_loss",
            fix='for example gt.term_loss({"next_token": 1.0, "mine": (0.1, my_function)})',
        )
    checked = tuple(_term(name, spec) for name, spec in terms.items())
    if not any(term.weight for term in checked):
        raise InputError(
            "learns_nothing",
            "every term weighs 0: no update would change anything",
            where="term_loss",
            fix="give one a weight",
        )
    return TermLoss(checked)


def _term(name: str, spec: Any) -> Term:
    where = f"term_loss[{name!r}]"
    weight, function = spec if isinstance(spec, tuple) and len(spec) == 2 else (1.0, spec)
    if isinstance(function, (int, float)) and not isinstance(spec, tuple):
        weight, function = function, BUILT_IN.get(name)
        if function is None:
            raise InputError(
                "unknown_loss",
                f"there is no built-in term {name!r}",
                where=where,
                fix=f"use one of {', '.join(BUILT_IN)}, or give (weight, function)",
            )
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not math.isfinite(weight)
    ):
        raise InputError(
            "loss_weight",
            f"the weight of term {name!r} is {weight!r}, not a finite number",
            where=where,
            fix="write (weight, function) with a number as weight",
        )
    if not callable(function):
        raise InputError(
            "loss_function_missing",
            f"term {name!r} has {type(function).__name__}, not a function",
            where=where,
            fix="give a function, (weight, function), or a weight for a built-in name",
        )
    return Term(name, float(weight), function, _takes_count(function))


def _takes_count(function: TermFunction) -> bool:
    """Whether a function can be called with a third argument, `num_items_in_batch`."""
    try:
        kinds = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # built in C: no signature
        return False
    if any(kind.name == "num_items_in_batch" for kind in kinds):
        return True
    places = [
        kind for kind in kinds if kind.kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD)
    ]
    required = [kind for kind in places if kind.default is kind.empty]
    return len(required) >= 3 or any(kind.kind is kind.VAR_POSITIONAL for kind in kinds)


class TermLoss:
    """What `term_loss` returns; call it as `compute_loss_func`.

    Args:
        terms: Checked.
    """

    def __init__(self, terms: tuple[Term, ...]) -> None:
        self.terms = terms

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Σ weight · term over a micro-batch, fp32 scalar with graph.

        Raises:
            RunError: A function raised or returned no scalar, or the loss has no graph; names the
                term.
        """
        if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() > 1:
            num_items_in_batch = num_items_in_batch.flatten()[0]  # DataParallel repeats it
        try:
            found = {
                term.name: (term.weight, _value(term, outputs, labels, num_items_in_batch))
                for term in self.terms
            }
            heard = listener.get() if torch.is_grad_enabled() else None
            if torch.is_grad_enabled():
                _refuse_without_graph(found, outputs)
            if heard is not None:
                heard.hear(found)
        except BaseException:
            listener.set(None)  # this training has ended; the next may have no callback
            raise
        # The Trainer multiplies the loss in place, so it must never be a term itself.
        return sum((weight * value for weight, value in found.values()), start=torch.zeros(()))


def _value(term: Term, outputs: Any, labels: Tensor | None, count: Tensor | int | None) -> Tensor:
    if labels is None and term.function in BUILT_IN.values():
        raise RunError(
            "no_labels",
            f"loss term {term.name!r} needs labels, and the batch has none",
            where=term.name,
            fix="use a data set or collator that gives labels",
        )
    try:
        if term.whole:
            result = (
                term.function(outputs, labels, num_items_in_batch=count)
                if _by_name(term)
                else term.function(outputs, labels, count)
            )
        else:
            result = term.function(outputs, labels)
    except (RunError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RunError(
            "loss_function_raised",
            f"loss term {term.name!r} raised {type(error).__name__}: {error}{_line(error)}",
            where=term.name,
            fix="the function takes (outputs, labels) or (outputs, labels, num_items_in_batch)",
        ) from error
    if not isinstance(result, Tensor):
        raise RunError(
            "loss_function_result",
            f"loss term {term.name!r} returned {type(result).__name__}, not a tensor",
            where=term.name,
            fix="return a scalar tensor with its graph: no float(), no item()",
        )
    if result.dim() != 0:
        raise RunError(
            "loss_not_scalar",
            f"loss term {term.name!r} returned the shape {tuple(result.shape)}",
            where=term.name,
            fix="return a scalar",
        )
    if term.whole or count is None or labels is None:
        return result
    # A mean over the micro-batch: its part of the update's mean.
    mine = (labels[..., 1:] != IGNORED).sum().to(result.device)
    return result * (mine / count)


def _by_name(term: Term) -> bool:
    return "num_items_in_batch" in inspect.signature(term.function).parameters


def _refuse_without_graph(found: Mapping[str, tuple[float, Tensor]], outputs: Any) -> None:
    """Names a term that leads to no trained tensor, and says whether it is the model's fault."""
    bare = [name for name, (weight, value) in found.items() if weight and not value.requires_grad]
    if not bare:
        return
    if not any(tensor.requires_grad for tensor in tensors_in(outputs)):
        raise RunError(
            "loss_without_graph",
            f"the model's output leads to no trained tensor, so loss term {bare[0]!r} has no graph",
            where=bare[0],
            fix="under reentrant checkpointing call model.enable_input_require_grads() or set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}; else look for a frozen or "
            "disabled adapter, no_grad or detach in the model",
        )
    raise RunError(
        "loss_without_graph",
        f"loss term {bare[0]!r} returned a scalar that leads to no trained tensor",
        where=bare[0],
        fix="compute it from the model's outputs, without detach, item or no_grad",
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a model's output: mappings, lists and tuples are looked into."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def _line(error: Exception) -> str:
    """Where in a user's function it was raised; empty where the function was not entered."""
    trace = error.__traceback__
    inside = None if trace is None else trace.tb_next
    if inside is None:
        return ""
    return f" ({Path(inside.tb_frame.f_code.co_filename).name}, line {inside.tb_lineno})"
