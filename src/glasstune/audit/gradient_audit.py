"""`GradientAudit`: a context manager around forward, losses and backward of any module."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn

from glasstune.audit.build import build_record
from glasstune.audit.collect import take_terms, why_no_graph
from glasstune.audit.gram import gram_matrix
from glasstune.audit.peft_names import layer_of
from glasstune.audit.ranks import join_ranks
from glasstune.audit.report import AuditReport, unknown
from glasstune.audit.session import Session
from glasstune.audit.state import Watched
from glasstune.audit.terms import Terms
from glasstune.core.errors import InputError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from glasstune.core.protocols import Exchange

Keep = Literal["gradients", "values"]

_OPEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules inside an open audit."""


class GradientAudit:
    """Watches one update of any module: who got a gradient, from which loss term, and if not, why.

        with GradientAudit(model, optimizer=optimizer) as audit:
            ...                                               # forward, losses
            audit.terms({"a": (wa, la), "b": (wb, lb)})       # before the backward
            (wa * la + wb * lb).backward()
        print(audit.report)

    One `with` holds one update: several forwards and backwards (gradient accumulation) add up.
    Nothing of the training changes: random generators, buffers, `.grad` and its accumulate hooks.
    Hooks that the caller set on tensors or modules run again for each term.

    The gradients of the terms are made when `terms` is called, by one backward a term. Inside the
    `with` they take one copy of the audited parameters' gradients for each term, and one more for
    the self-check; after it one for each term, or none without `keep="gradients"`.

    Args:
        model: Any module with parameters.
        optimizer: Tells which parameters it holds; None leaves that open.
        match: Glob of parameter names; only these are audited.
        keep: `gradients` keeps each term's gradients for `gradient`; `values` keeps values and
            gradients as text, to be printed. One name, several, or ().
        step: Number of the update, for the record.
        frozen_values: Whether frozen parameters are summarised too (one pass over them).
        activations: Whether modules' outputs are watched for NaN and Inf.
        left_alone: Promise that nothing changes a `.grad` between the last backward and the end
            of the `with` (no clipping, no step): fewer passes over the gradients.
        exchange: Other ranks that each compute a part of the update, and whose `.grad` were added
            up before the end of the `with`; all of them leave it together.

    Raises:
        InputError: `no_parameters`, `no_match`, `unknown_keep`; on entering `audit_nested`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        match: str | None = None,
        keep: Keep | Collection[Keep] = "gradients",
        step: int | None = None,
        frozen_values: bool = True,
        activations: bool = True,
        left_alone: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        self.model = model
        self._exchange = exchange
        self.optimizer = optimizer
        self.match = match
        self.step = step
        self.keep: frozenset[str] = frozenset((keep,) if isinstance(keep, str) else keep)
        self._frozen_values = frozen_values
        self._activations = activations
        self._left_alone = left_alone
        self._session: Session | None = None
        self._report: AuditReport | None = None
        self._open = False
        self._check()

    def _check(self) -> None:
        strange = sorted(self.keep - {"gradients", "values"})
        if strange:
            raise InputError(
                "unknown_keep",
                f"nothing named {', '.join(map(repr, strange))} can be kept",
                where="keep",
                fix="use 'gradients', 'values', both or ()",
            )
        names = [name for name, _ in self.model.named_parameters()]
        if not names:
            raise InputError(
                "no_parameters",
                f"{type(self.model).__name__} has no parameters",
                where="model",
                fix="give the module that is trained",
            )
        if not any(self._audited(name) for name in names):
            near = get_close_matches(str(self.match), names, n=1, cutoff=0.0)[0]
            raise InputError(
                "no_match",
                f"no parameter is named like {self.match!r}",
                where="match",
                fix=f"it is a glob over names such as {near}",
            )

    def _audited(self, name: str) -> bool:
        return self.match is None or fnmatchcase(name, self.match)

    def __enter__(self) -> Self:
        if any(module in _OPEN for module in self.model.modules()):
            raise InputError(
                "audit_nested",
                f"{type(self.model).__name__} is inside another open audit",
                where="GradientAudit",
                fix="leave the first `with` before the second; one audit takes several forwards",
            )
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        session = Session(
            self.model,
            audited=self._audited,
            activations=self._activations,
            frozen_values=self._frozen_values,
            left_alone=self._left_alone,
            keep_values="values" in self.keep,
            leaves=[value for group in groups for value in group["params"]],
        )
        self._session, self._report = session, None
        try:
            session.attach()
        except BaseException:
            session.detach()
            raise
        self._marked = list(self.model.modules())
        _OPEN.update(self._marked)
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        self._session.detach()
        for module in self._marked:
            _OPEN.discard(module)
        self._marked = []
        self._open = False
        if error is None:
            self._finish(self._session, self._exchange)
            return
        if isinstance(error, RuntimeError) and "does not require grad and does not" in str(error):
            why = why_no_graph(self._session)
            self._session.no_graph = "the loss has no graph" + (f": {why}" if why else "")
        try:
            self._finish(self._session)
        except Exception as second:  # the caller's own error is the one to be seen
            error.add_note(f"the gradient audit failed too: {type(second).__name__}: {second}")

    def _finish(self, session: Session, exchange: Exchange | None = None) -> None:
        session.finish()
        join_ranks(session, exchange)
        record = build_record(
            session,
            audited=self._audited,
            optimizer=self.optimizer,
            step=self.step,
            keep_values="values" in self.keep,
        )
        self._report = AuditReport(record)
        session.release("gradients" in self.keep)

    def terms(
        self, terms: Terms, counts: Mapping[str, float] | None = None, *, split: bool = True
    ) -> None:
        """Names the weighted terms of the loss: after its forward, before its backward.

        With gradient accumulation it is called once for each backward; weights stay the same.

        Args:
            terms: Name to (weight, loss). A weight is a number or a scalar tensor, also a learned
                one; a loss is a scalar with a graph, or a function without arguments that returns
                one.
            counts: What each loss is divided by over the whole update, where it is a sum whose
                weight already holds that division; for the record alone.
            split: Whether each term gets a backward of its own; if not, its graph is walked (what
                it reaches, and why something is not reached) and its gradient is not known.

        Raises:
            InputError: `audit_closed`, `no_terms`, `term_twice`, `terms_twice`, `term_not_pair`,
                `term_name`, `term_weight`, `weight_changed`, `loss_function_raised`,
                `loss_not_tensor`, `loss_not_scalar`, `loss_without_graph`,
                `backward_before_terms`, `unknown_term`; each names its term.
        """
        take_terms(self._opened(), terms, counts, split)

    def combine(self, terms: Terms, counts: Mapping[str, float] | None = None) -> Tensor:
        """Hands the terms in as `terms` does and returns Σ weight * loss, scalar, with graph.

        Raises:
            InputError: As `terms`.
        """
        first, *others = take_terms(self._opened(), terms, counts)
        total = first.weighted()
        for term in others:
            total = total + term.weighted()
        return total

    def _opened(self) -> Session:
        if not self._open or self._session is None:
            raise InputError(
                "audit_closed",
                "terms were given outside the audit's `with`",
                where="terms",
                fix="hooks must be set before the forward: put forward, losses, terms() and "
                "backward inside the `with`",
            )
        return self._session

    @property
    def report(self) -> AuditReport:
        """The audit record, once the `with` is left (also by an exception).

        Raises:
            InputError: `audit_open`.
        """
        if self._report is None:
            raise InputError(
                "audit_open",
                "the report is there when the audit's `with` is left",
                where="report",
                fix="read audit.report after the `with`",
            )
        return self._report

    def gradient(self, term: str, parameter: str) -> Tensor | None:
        """Gradient of one term at one parameter, without the weight; do not change it in place.

        Args:
            term: Its name.
            parameter: As `named_parameters` has it.

        Returns:
            A tensor like the parameter, summed over the calls of `terms`, or None where the term
            gave it none.

        Raises:
            InputError: `unknown_term`, `unknown_parameter`, `gradients_not_kept`,
                `terms_not_split`.
        """
        session = self._with_terms(term)
        if self._report is not None and "gradients" not in self.keep:
            raise InputError(
                "gradients_not_kept",
                "the audit kept no gradients by term",
                where=term,
                fix='give GradientAudit keep="gradients"',
            )
        return self._find(session, parameter).gradients.get(term)

    def gram(self, layer: str | None = None) -> Tensor:
        """Inner products <g_i, g_j> of the terms' gradients, without weights.

        Args:
            layer: A layer or a parameter; None for all audited parameters together.

        Returns:
            float64 [K, K] on the CPU, in the order of the terms.

        Raises:
            InputError: `unknown_layer`, `no_terms`, `terms_not_split`.
        """
        session = self._with_terms(None)
        size = len(session.terms)
        total = torch.zeros(size, size, dtype=torch.float64)
        found = False
        for watched in session.watched.values():
            if layer in (None, watched.name, layer_of(watched.name)):
                found = True
                if watched.gram is not None:
                    total += watched.gram.cpu()
                elif watched.gradients:
                    total += gram_matrix(
                        [watched.gradients.get(name) for name in session.terms]
                    ).cpu()
        if not found:
            known = dict.fromkeys(layer_of(watched.name) for watched in session.watched.values())
            raise unknown("layer", str(layer), list(known))
        return total

    def _with_terms(self, term: str | None) -> Session:
        session = self._session
        if session is None or not session.terms:
            raise InputError(
                "no_terms",
                "no loss terms were given to the audit",
                where=term or "terms",
                fix='call audit.terms({"name": (weight, loss)}) before the backward',
            )
        if term is not None and term not in session.terms:
            raise unknown("term", term, list(session.terms))
        if session.engine not in ("grad", "backward"):
            raise InputError(
                "terms_not_split",
                f"gradients could not be split by term: {session.notes.get('cannot_split', '')}",
                where=term or "terms",
                fix="audit the model in its plain form",
            )
        return session

    @staticmethod
    def _find(session: Session, parameter: str) -> Watched:
        for watched in session.watched.values():
            if watched.name == parameter:
                return watched
        raise unknown(
            "parameter", parameter, [watched.name for watched in session.watched.values()]
        )
