"""Takes the terms of one backward: walks their graphs, splits the gradient, looks for breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glasstune.audit.engine import CannotSplit, Gradients, by_backward, by_grad, unchanged
from glasstune.audit.reach import Reach, walk
from glasstune.audit.session import Session
from glasstune.audit.state import TermState, Watched
from glasstune.audit.terms import Term, Terms, read_terms
from glasstune.core.errors import InputError


def take_terms(
    session: Session, terms: Terms, counts: Mapping[str, float] | None, split: bool = True
) -> list[Term]:
    """Checks, walks and splits; see `GradientAudit.terms`."""
    try:
        found = read_terms(terms, lambda: why_no_graph(session))
    except InputError as error:
        if error.code == "loss_without_graph":
            session.no_graph = error.message
        raise
    for term in found:
        _check_again(session, term)
    for name in counts or {}:
        if name not in {term.name for term in found}:
            raise InputError(
                "unknown_term",
                f"counts names {name!r}, which is no term",
                where=name,
                fix=f"the terms are: {', '.join(term.name for term in found)}",
            )
    session.splits = split
    session.hook_unfrozen()
    reaches = [walk([term.loss]) for term in found]
    watched = [w for w in session.watched.values() if w.tensor.requires_grad]
    for term, reach in zip(found, reaches, strict=True):
        state = session.terms.setdefault(term.name, TermState(term.name, term.weight))
        state.losses.append(term.loss.detach().reshape(()).clone())
        state.fresh = True
        state.arrivals = session.arrivals
        state.last = term.loss.grad_fn
        if counts is not None and term.name in counts:
            state.counts.append(float(counts[term.name]))
        for one in watched:
            one.note_reach(term.name, reach.reaches(one.tensor))
    session.compiled |= any(reach.compiled for reach in reaches)
    session.reentrant |= any(reach.reentrant for reach in reaches)
    if split:
        _split(session, found, reaches, watched)
    nodes: set[Any] = set().union(*(reach.nodes for reach in reaches))
    session.find_breaks(nodes)
    return found


def _check_again(session: Session, term: Term) -> None:
    """A term that comes again must belong to another backward and weigh the same."""
    state = session.terms.get(term.name)
    if state is None:
        return
    if state.last is not None and state.last is term.loss.grad_fn:
        again = "with the same loss"
    elif state.fresh and session.log.seen and session.arrivals == state.arrivals:
        again = "without a forward or a backward in between"
    else:
        again = ""
    if again:
        raise InputError(
            "terms_twice",
            f"loss term {term.name!r} was given twice {again}",
            where=term.name,
            fix="give each term once for each backward; call terms() with all of them at once",
        )
    same = state.weight == term.weight or (
        state.weight != state.weight and term.weight != term.weight
    )
    if not same:
        raise InputError(
            "weight_changed",
            f"the weight of loss term {term.name!r} was {state.weight:g} and is {term.weight:g} "
            "now, inside one audit",
            where=term.name,
            fix="put the factor into the loss, or audit each update in a `with` of its own",
        )


def _split(
    session: Session, terms: Sequence[Term], reaches: Sequence[Reach], watched: Sequence[Watched]
) -> None:
    """Runs one backward a term and adds what it gives to each parameter's sums."""
    tensors = [one.tensor for one in watched]
    if not tensors:
        return
    reentrant = any(reach.reentrant for reach in reaches)
    if reentrant and torch.distributed.is_available() and torch.distributed.is_initialized():
        session.engine = "unknown"
        session.notes["cannot_split"] = (
            "reentrant checkpointing asks for a real backward a term, which would start the "
            "gradient exchange between processes again; use use_reentrant=False"
        )
        return
    session.mute(True)
    try:
        with unchanged(session.written_buffers()):
            for term, reach in zip(terms, reaches, strict=True):
                given = _gradients(session, term, reach, tensors, reentrant)
                for one, gradient in zip(watched, given, strict=True):
                    one.collect(term.name, gradient, term.weight)
                    if reentrant:
                        _settle(one, term.name, gradient, reach)
                del given  # where earlier calls were added to it, nobody needs this one any more
            _through_weights(terms, watched)
    except CannotSplit as error:
        session.engine = "unknown"
        session.notes["cannot_split"] = str(error)
        for one in watched:
            one.gradients, one.residual, one.extra = {}, None, None
        return
    finally:
        session.mute(False)
    if session.engine != "unknown":
        session.engine = "backward" if reentrant else "grad"


def _gradients(
    session: Session, term: Term, reach: Reach, tensors: Sequence[Tensor], reentrant: bool
) -> Gradients:
    if reentrant:
        others = [w.tensor for w in session.watched.values()]
        leaves = [*reach.leaves, *session.leaves, *others]
        return by_backward(term.loss, tensors, leaves, term.name)
    return by_grad(term.loss, tensors, term.name)


def _settle(one: Watched, term: str, gradient: Tensor | None, reach: Reach) -> None:
    """A real backward has told what the walk could not; a compiled region stays unknown."""
    if one.reached[term] != "unknown":
        return
    if gradient is None:
        one.reached[term] = False
    elif not (reach.compiled and id(one.tensor) in reach.perhaps):
        one.reached[term] = True


def _through_weights(terms: Sequence[Term], watched: Sequence[Watched]) -> None:
    """Adds what reaches parameters of the model through learned weights: Σ l_i ∂w_i/∂θ."""
    learned = [
        term.factor * term.loss.detach()
        for term in terms
        if isinstance(term.factor, Tensor) and term.factor.requires_grad
    ]
    if not learned:
        return
    total = torch.stack([part.reshape(()) for part in learned]).sum()
    tensors = [one.tensor for one in watched]
    for one, gradient in zip(watched, by_grad(total, tensors, "weights"), strict=True):
        if gradient is not None:
            one.extra = gradient.detach() if one.extra is None else one.extra + gradient
            one.add(gradient, 1.0)


def why_no_graph(session: Session) -> str:
    """Explains, from the calls that were seen, why a loss has no graph."""
    calls = [c for c in session.log.calls.values() if c.count]
    if not any(w.tensor.requires_grad for w in session.watched.values()):
        return "no parameter of the model requires a gradient"
    if not torch.is_grad_enabled():
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        return f"gradients are off here ({mode})"
    with_own = [c for c in calls if c.parameters]
    if with_own and any(c.reentrant for c in with_own):
        return (
            "the modules ran inside reentrant checkpointing whose inputs need no gradient; call "
            "enable_input_require_grads() or use use_reentrant=False"
        )
    if with_own and not any(c.with_grad for c in with_own):
        mode = "inference_mode" if all(c.inference for c in with_own) else "no_grad"
        line = with_own[0].no_grad_line
        return f"the model ran under {mode}" + (f" ({line})" if line else "")
    return ""
