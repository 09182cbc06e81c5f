"""Named, weighted scalar losses: what the caller gives, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from glasstune.core.errors import InputError

Weight = float | int | Tensor
Loss = Tensor | Callable[[], Tensor]
Terms = Mapping[str, tuple[Weight, Loss]] | Iterable[tuple[str, tuple[Weight, Loss]]]


@dataclass(frozen=True, slots=True)
class Term:
    """One term of one call.

    Args:
        name: Its name.
        factor: The weight as given.
        weight: The same as a number.
        loss: Scalar, with graph.
    """

    name: str
    factor: Weight
    weight: float
    loss: Tensor

    def weighted(self) -> Tensor:
        """Factor * loss, with graph."""
        return self.factor * self.loss


def read_terms(terms: Terms, why_no_graph: Callable[[], str]) -> list[Term]:
    """Checks what was given.

    Args:
        terms: Name to (weight, loss); pairs are taken too, so that a name given twice is seen.
        why_no_graph: Explains a loss without a graph, if it can.

    Raises:
        InputError: `no_terms`, `term_twice`, `term_name`, `term_not_pair`, `term_weight`,
            `loss_function_raised`, `loss_not_tensor`, `loss_not_scalar`, `loss_without_graph`;
            each names its term.
    """
    items = list(terms.items() if isinstance(terms, Mapping) else terms)
    if not items:
        raise InputError(
            "no_terms",
            "no loss term was given",
            where="terms",
            fix='give at least one: audit.terms({"loss": (1.0, loss)})',
        )
    found: list[Term] = []
    for item in items:
        if not (isinstance(item, tuple) and len(item) == 2):
            raise InputError(
                "term_not_pair",
                f"{type(item).__name__} instead of a (name, (weight, loss)) pair",
                where="terms",
                fix='write {"name": (weight, loss)}',
            )
        name, content = item
        if not isinstance(name, str) or not name:
            raise InputError(
                "term_name",
                f"a term's name is a non-empty string, not {name!r}",
                where="terms",
                fix='write {"name": (weight, loss)}',
            )
        if any(term.name == name for term in found):
            raise InputError(
                "term_twice",
                f"two loss terms are named {name!r}",
                where=name,
                fix="give each a name of its own, or add them up before",
            )
        found.append(_read_term(name, content, why_no_graph))
    return found


def _read_term(name: str, content: object, why_no_graph: Callable[[], str]) -> Term:
    if not (isinstance(content, (tuple, list)) and len(content) == 2):
        raise InputError(
            "term_not_pair",
            f"loss term {name!r} is {type(content).__name__}, not (weight, loss)",
            where=name,
            fix=f'write {{"{name}": (1.0, loss)}}',
        )
    factor, loss = content
    weight = _read_weight(name, factor)
    if callable(loss) and not isinstance(loss, Tensor):
        loss = _call(name, loss)
    if not isinstance(loss, Tensor):
        raise InputError(
            "loss_not_tensor",
            f"loss term {name!r} is {type(loss).__name__}, not a tensor",
            where=name,
            fix="give the loss itself, not loss.item() or float(loss)",
        )
    if loss.numel() != 1:
        raise InputError(
            "loss_not_scalar",
            f"loss term {name!r} has shape {tuple(loss.shape)}, not one value",
            where=name,
            fix="sum it or take its mean",
        )
    if not loss.requires_grad:
        kind = "" if loss.dtype.is_floating_point else f" (it is {loss.dtype})"
        why = why_no_graph()
        raise InputError(
            "loss_without_graph",
            f"loss term {name!r} has no graph{kind}, so it leads to no parameter"
            + (f": {why}" if why else ""),
            where=name,
            fix="compute it with gradients on, without detach, item, argmax or an integer type; "
            "leave it out on steps where it is a constant",
        )
    return Term(name, factor, weight, loss)


def _read_weight(name: str, factor: object) -> float:
    if isinstance(factor, bool) or not isinstance(factor, (int, float, Tensor)):
        item = getattr(factor, "item", None)  # numpy scalars
        if not callable(item) or getattr(factor, "size", 1) != 1:
            raise InputError(
                "term_weight",
                f"the weight of loss term {name!r} is {type(factor).__name__}, not a number",
                where=name,
                fix=f'write {{"{name}": (1.0, loss)}}',
            )
        return float(item())
    if isinstance(factor, Tensor):
        if factor.numel() != 1 or factor.is_complex():
            raise InputError(
                "term_weight",
                f"the weight of loss term {name!r} has shape {tuple(factor.shape)}, not one value",
                where=name,
                fix="index it: weights[0]",
            )
        return float(factor.detach())
    return float(factor)


def _call(name: str, function: Callable[[], object]) -> object:
    try:
        return function()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        line = "" if trace is None else f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
        raise InputError(
            "loss_function_raised",
            f"the function of loss term {name!r} raised {type(error).__name__}: {error}{line}",
            where=name,
            fix="it takes no argument and returns a scalar tensor",
        ) from error
