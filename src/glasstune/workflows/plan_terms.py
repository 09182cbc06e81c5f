"""What loss terms do to memory: the built-in ones by their own code, on tensors without data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from glasstune.core.findings import Finding
from glasstune.workflows.prepare_run import Prepared

if TYPE_CHECKING:
    from torch import Tensor

    from glasstune.planner.trace import Behind
    from glasstune.training.terms import Term


def planned_terms(prepared: Prepared) -> dict[str, Any]:
    """Returns what `planner.model.Setup` is told of the loss terms."""
    terms = prepared.terms
    names = {term.name for term in terms if term.function is None}
    known = names & {"next_token", "z_loss", "kl_to_base"}
    return {
        # Where only the user's functions are there, the next token's loss stands for them.
        "next_token": "next_token" in names or not known,
        "z_loss": "z_loss" in names,
        "extras": tuple(
            partial(_kl_to_base, some=term.source_indices is not None)
            for term in terms
            if term.function is None and term.name == "kl_to_base"
        ),
        "split": split_terms(prepared),
    }


def split_terms(prepared: Prepared) -> int:
    """Returns how many terms have a backward of their own in an audited update; 0 for none."""
    audited = prepared.config.audit.every_n_steps > 0
    return len(prepared.terms) if audited and len(prepared.terms) > 1 else 0


def _kl_to_base(given: Behind, some: bool) -> Tensor:
    """Runs the term itself on tensors without data.

    Args:
        given: What it finds.
        some: Whether it sees the rows of some sources only: in the worst batch all rows are
            theirs, and they are copied.
    """
    import torch

    from glasstune.training.terms import LossBatch, kl_to_base

    count, device = len(given.hidden), given.hidden.device
    weight: Any = given.head.weight
    places = torch.zeros(count, dtype=torch.int64, device=device)
    hidden, base = given.hidden, given.base
    if some:
        hidden, base = hidden[places], lambda: given.base()[places]
    return kl_to_base(
        LossBatch(
            hidden=hidden, labels=places, documents=places, sources=places, source_weights=[1.0],
            columns={}, step=1, vocabulary=int(weight.shape[0]), head=given.head, base=base,
            adapters_off=given.adapters_off,
        )
    )  # fmt: skip


def terms_note(terms: Sequence[Term]) -> str:
    """Says how the loss terms were planned; empty where next_token is all."""
    names = [term.name for term in terms if term.function is None and term.name != "next_token"]
    return (
        f"{', '.join(names)}: their own operations traced on tensors without data" if names else ""
    )


def unplanned_terms(terms: Sequence[Term]) -> list[Finding]:
    """Says of which terms nobody can know the memory before they run."""
    names = [term.name for term in terms if term.function is not None]
    if not names:
        return []
    known = [term.name for term in terms if term.function is None]
    stands = "" if known else "; the plan has the next token's loss in their place"
    return [
        Finding(
            "terms_not_planned",
            "warning",
            "losses",
            f"what {', '.join(names)} take{'s' if len(names) == 1 else ''} is not in the plan: "
            f"only running {'it' if len(names) == 1 else 'them'} would tell{stands}",
            "glasstune plan --measure runs a real step with them; sum_over_chunks keeps logits "
            "small",
        )
    ]
