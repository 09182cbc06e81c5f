"""A loss or gradient that is NaN or infinite: which term, which rows, which module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import Parameter

from glasstune.core.batch import IGNORED, Document, MicroBatch
from glasstune.core.errors import RunError
from glasstune.core.protocols import StepAudit
from glasstune.fast.speed_up import plain
from glasstune.training.terms import Term, term_sums

if TYPE_CHECKING:
    from glasstune.training.distributed import World
    from glasstune.training.step import AdaptedModel

KEPT = " (the last good checkpoint is kept)"


class NonFinite(RunError):
    """An update that must not be made; the weights are those before it.

    Args:
        rows: Origins of the documents at fault; empty where they are not known yet.
    """

    def __init__(
        self, code: str, message: str, *, where: str = "", fix: str = "", rows: Sequence[str] = ()
    ) -> None:
        super().__init__(code, message, where=where, fix=fix)
        self.rows = tuple(rows)


def check_finite(
    adapted: AdaptedModel,
    terms: Sequence[Term],
    batches: Sequence[MicroBatch],
    sums: Sequence[tuple[int, str]],
    values: Sequence[float],
    step: int,
    epoch: int,
) -> None:
    """Stops at the first sum that is not finite.

    Args:
        adapted: The model.
        terms: All terms.
        batches: The update's micro-batches.
        sums: (index of the micro-batch, name of the term).
        values: The sums on the host.
        step: 1-based number of the update.
        epoch: 0-based epoch.

    Raises:
        NonFinite: `non_finite_loss`, naming step, term and the rows that cause it.
    """
    for (index, name), value in zip(sums, values, strict=True):
        if math.isfinite(value):
            continue
        batch = batches[index]
        mine = [term for term in terms if term.name == name]
        guilty = guilty_of_loss(adapted, mine, [batch], step, epoch)
        total = len(batch.documents)
        fix = "look at these rows, or lower the learning rate"
        if len(guilty) in (0, total):
            who = "every row of the batch gives it" if guilty else "no row gives it alone"
            fix = f"{who}: look at the learning rate and the precision"
        raise NonFinite(
            "non_finite_loss",
            f"loss term {name!r} is {value} at step {step}; rows: "
            + rows_text(guilty or batch.documents),
            where=f"step {step}",
            fix=fix + KEPT,
            rows=origins(guilty or batch.documents),
        )


@torch.no_grad()
def guilty_of_loss(
    adapted: AdaptedModel,
    terms: Sequence[Term],
    batches: Sequence[MicroBatch],
    step: int,
    epoch: int,
) -> list[Document]:
    """Replays each document alone; returns those in which one of these terms is not finite.

    As PEFT computes it: every document has a length of its own, and compiled blocks would be
    compiled for each.
    """
    guilty: list[Document] = []
    for batch in batches:
        for document in batch.documents:
            with plain(adapted.model), adapted.precision():
                alone = adapted.loss_batch(single_document(document, batch.position), step, epoch)
                found = term_sums(terms, alone)
            if any(not bool(torch.isfinite(total)) for total, _ in found.values()):
                guilty.append(document)
    return guilty


def guilty_of_gradient(
    adapted: AdaptedModel,
    terms: Sequence[Term],
    batches: Sequence[MicroBatch],
    parameters: Mapping[str, Parameter],
    step: int,
    epoch: int,
) -> list[Document]:
    """Replays each document of an update alone; returns those whose gradient is not finite."""
    guilty: list[Document] = []
    values = list(parameters.values())
    for batch in batches:
        for document in batch.documents:
            with plain(adapted.model), adapted.precision():
                alone = adapted.loss_batch(single_document(document, batch.position), step, epoch)
                found = term_sums(terms, alone)
            parts = [
                term.config.weight_at(step) * found[term.name][0]
                for term in terms
                if term.name in found and found[term.name][0].requires_grad
            ]
            if not parts:
                continue
            gradients = torch.autograd.grad(torch.stack(parts).sum(), values, allow_unused=True)
            if any(g is not None and not bool(torch.isfinite(g).all()) for g in gradients):
                guilty.append(document)
    return guilty


def single_document(document: Document, position: int) -> MicroBatch:
    """A micro-batch of one document in one row."""
    length = len(document)
    targets = np.full((1, length), IGNORED, dtype=np.int64)
    targets[0, :-1] = document.labels[1:]
    return MicroBatch(
        input_ids=document.ids.astype(np.int64)[None],
        position_ids=np.arange(length, dtype=np.int64)[None],
        targets=targets,
        document_ids=np.zeros((1, length), dtype=np.int32),
        bounds=((0, length),),
        documents=(document,),
        position=position,
        packed=False,
    )


def of_all_ranks(world: World, error: NonFinite | None, what: str) -> NonFinite:
    """Returns one error for all ranks: that of the first one whose own rows give it.

    Args:
        world: The ranks; all of them call this.
        error: This rank's, or None where its rows are well.
        what: What every rank has seen, for the case that no rank's rows give it.
    """
    mine = None if error is None else {**error.to_dict(), "rows": list(error.rows)}
    everybody = list(enumerate(world.gather(mine)))
    found = [(rank, one) for rank, one in everybody if one is not None]
    if not found:
        return NonFinite("non_finite_loss", what, fix="lower the learning rate" + KEPT)
    rank, one = next(((rank, one) for rank, one in found if one["rows"]), found[0])
    return NonFinite(
        one["code"],
        one["message"] + (f" (of rank {rank})" if world.size > 1 else ""),
        where=one["where"],
        fix=one["fix"],
        rows=one["rows"],
    )


def origins(documents: Iterable[Document]) -> list[str]:
    """Where the documents came from, `file:line` each."""
    return [document.origin or "?" for document in documents]


def rows_text(documents: Sequence[Document]) -> str:
    """The first origins and how many more there are."""
    more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
    return ", ".join(origins(documents[:8])) + more


def looked_into(
    error: NonFinite,
    *,
    step: int,
    find_rows: Callable[[], list[Document]],
    audit: StepAudit | None,
    replay: Callable[[], None],
    forget: Callable[[], None],
) -> NonFinite:
    """Completes the error of a bad update by replaying it: rows, terms, the first bad module.

    Args:
        error: What was seen first.
        step: 1-based number of the update.
        find_rows: Finds the documents at fault, where the error does not name them.
        audit: Looks again, or None.
        replay: Computes the update again under that audit.
        forget: Drops every `.grad`.

    Returns:
        The error to raise.
    """
    message, rows = error.message, list(error.rows)
    forget()
    try:
        if not rows:
            documents = find_rows()
            rows = origins(documents)
            named = rows_text(documents) if documents else "none of them gives it alone"
            message += f"; rows: {named}"
        if audit is not None:
            seen = audit.examine(step, replay, rows=rows, error=error.message)
            unsaid = [repr(name) for name in seen.terms if repr(name) not in message]
            if unsaid:
                message += f"; not finite from term {', '.join(unsaid)}"
            if seen.text:
                message += f"; {seen.text}"
    except Exception as second:  # the first error is the one to be seen
        message += f"; looking into it failed too: {type(second).__name__}: {second}"
    finally:
        forget()
    return NonFinite(error.code, message, where=error.where, fix=error.fix, rows=rows)
