"""What is known of one parameter, as a status and a reason."""

from __future__ import annotations

import math

from glasstune.audit.numbers import Numbers, root
from glasstune.audit.peft_names import layer_of, partner_of
from glasstune.audit.reasons import Evidence, why_frozen, why_none, why_zero
from glasstune.audit.session import Session
from glasstune.audit.state import Watched, grad_of, text_of
from glasstune.core.gradients import (
    Gram,
    ParameterAudit,
    Reason,
    Status,
    TensorSummary,
    TermAtParameter,
    shares,
)


class Judge:
    """Turns what is known of a parameter into its row."""

    def __init__(
        self,
        session: Session,
        numbers: Numbers,
        names: list[str],
        weights: list[float],
        held: set[int] | None,
    ) -> None:
        self.session, self.numbers = session, numbers
        self.names, self.weights, self.held = names, weights, held
        self.owners: dict[int, list[tuple[str, str]]] = {}
        self.by_name: dict[str, int] = {}
        for name, tensor in session.model.named_parameters(remove_duplicate=False):
            path, _, attribute = name.rpartition(".")
            self.owners.setdefault(id(tensor), []).append((path, attribute))
            self.by_name[name] = id(tensor)

    def row(self, name: str, watched: Watched, keep_values: bool) -> ParameterAudit:
        """Judges one parameter."""
        key, tensor = id(watched.tensor), watched.tensor
        increment, after = self.numbers.increment.get(key), self.numbers.after.get(key)
        before = self.numbers.before.get(key) if watched.arrivals else after
        status, reason = self._judge(name, watched, increment, after)
        texts = dict(watched.texts)
        if keep_values:
            texts["grad_after"] = text_of(grad_of(tensor))
            texts.setdefault("grad_before", texts["grad_after"])
        return ParameterAudit(
            name=name,
            layer=layer_of(name),
            shape=list(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            requires_grad=tensor.requires_grad,
            in_optimizer=None if self.held is None else key in self.held,
            value=self.numbers.value.get(key),
            grad_before=before,
            increment=increment,
            grad_after=after,
            status=status,
            reason=reason,
            terms=self._terms(watched),
            texts=texts,
        )

    def _judge(
        self,
        name: str,
        watched: Watched,
        increment: TensorSummary | None,
        after: TensorSummary | None,
    ) -> tuple[Status, Reason | None]:
        tensor = watched.tensor
        if not tensor.requires_grad:
            return "frozen", why_frozen(self.session.model, name, tensor)
        # A tensor that the audit never saw has no hook: its .grad is all there is to go by.
        arrived = watched.arrivals > 0 or (id(tensor) not in self.session.watched)
        if after is None or not arrived:
            return "none", self._why_none(name, watched, increment, after)
        if not after.finite or (increment is not None and not increment.finite):
            return "nonfinite", self._why_nonfinite(watched)
        if self.held is not None and id(tensor) not in self.held:
            text = "it has a gradient but is in no group of the optimiser, so it never moves"
            return "not_in_optimizer", Reason("not_in_optimizer", text)
        if after.zero:
            if increment is not None and not increment.zero:
                return "zero", self._why_none(name, watched, increment, after)
            return "zero", self._why_zero(name, watched)
        return "ok", None

    def _why_none(
        self,
        name: str,
        watched: Watched,
        increment: TensorSummary | None,
        after: TensorSummary | None,
    ) -> Reason:
        session = self.session
        reason = why_none(
            session.model,
            session.log,
            Evidence(
                name=name,
                tensor=watched.tensor,
                owners=self.owners[id(watched.tensor)],
                arrivals=watched.arrivals,
                arrived=None if increment is None else increment.norm,
                reached=watched.reached_at_all(),
                compiled=session.compiled,
                no_graph=session.no_graph,
                backward=session.arrivals > 0,
                broken=watched.broken,
            ),
        )
        if after is not None and not watched.arrivals:
            text = f"{reason.text}; .grad still holds an earlier gradient (norm {after.norm:.3g})"
            return Reason(reason.code, text, reason.module, reason.line)
        return reason

    def _why_nonfinite(self, watched: Watched) -> Reason:
        bad = [
            name
            for index, name in enumerate(self.names)
            if not math.isfinite(self._own_gram(watched)[index][index])
        ]
        value = self.numbers.value.get(id(watched.tensor))
        text = "its gradient holds NaN or Inf"
        if bad:
            text += f", from {', '.join(bad)}"
        if value is not None and not value.finite:
            text += "; its value does already"
        return Reason("nonfinite", text)

    def _why_zero(self, name: str, watched: Watched) -> Reason:
        partner = partner_of(name)
        key = None if partner is None else self.by_name.get(partner[1])
        other = None if key is None else self.numbers.value.get(key)
        own = self.numbers.value.get(id(watched.tensor))
        reaching = [
            index for index, term in enumerate(self.names) if watched.reached.get(term) is not False
        ]
        gram = self._own_gram(watched)
        return why_zero(
            partner[0] if partner is not None and key is not None else None,
            other is not None and other.zero,
            own is not None and own.zero,
            [self.weights[index] for index in reaching],
            [gram[index][index] for index in reaching if self.weights[index]],
        )

    def _own_gram(self, watched: Watched) -> Gram:
        size = len(self.names)
        return self.numbers.gram.get(id(watched.tensor)) or [[0.0] * size for _ in range(size)]

    def _terms(self, watched: Watched) -> dict[str, TermAtParameter]:
        if not watched.tensor.requires_grad:
            return {name: TermAtParameter(False, 0.0, None) for name in self.names}
        gram = self._own_gram(watched)
        parts = shares(gram, self.weights)
        known = self.session.engine in ("grad", "backward")
        return {
            name: TermAtParameter(
                reached=watched.reached.get(name, False),
                norm=root(gram[index][index]) if known else None,
                share=parts[index] if known else None,
            )
            for index, name in enumerate(self.names)
        }
