"""Loss, perplexity and token accuracy over any number of rows.

The loss is the sum over all trained tokens divided by their number: one value whatever the batch
size. A mean of batch means would weigh a token by the company it keeps.

Shape letters: R rows of a micro-batch, L tokens of a row, N trained positions, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from glasstune.core.batch import IGNORED, MicroBatch
from glasstune.core.protocols import Progress
from glasstune.core.records import EvaluateRecord
from glasstune.models.families.install import packing_kwargs
from glasstune.models.head import HeadSplit


class TokenLosses(Protocol):
    """The kernels' `token_losses`: head and loss in chunks, so that all logits never exist."""

    def __call__(
        self,
        hidden_Nd: Tensor,
        head: Callable[[Tensor], Tensor],
        targets_N: Tensor,
        vocabulary: int,
    ) -> tuple[Tensor, Tensor]:
        """Returns (nll fp32 [N] in nats, correct bool [N])."""


@dataclass
class SourceSums:
    """Sums over trained tokens of one source."""

    nll: float = 0.0
    correct: int = 0
    tokens: int = 0

    def add(self, nll: float, correct: int, tokens: int) -> None:
        """Adds another part."""
        self.nll += nll
        self.correct += correct
        self.tokens += tokens

    @property
    def loss(self) -> float:
        """Mean negative log likelihood in nats; NaN without a token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def accuracy(self) -> float:
        """Share of trained tokens whose most likely prediction is right; NaN without a token."""
        return self.correct / self.tokens if self.tokens else math.nan


@dataclass
class EvalSums(SourceSums):
    """Sums over everything, and by source index."""

    by_source: dict[int, SourceSums] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss); inf where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_record(self, source_names: Iterable[str]) -> EvaluateRecord:
        """Makes the contract's record; `source_names` in the order of their index."""
        names = list(source_names)
        return EvaluateRecord(
            eval_loss=self.loss,
            perplexity=self.perplexity,
            token_accuracy=self.accuracy,
            tokens=self.tokens,
            by_source={
                names[index]: {
                    "eval_loss": part.loss,
                    "token_accuracy": part.accuracy,
                    "tokens": float(part.tokens),
                }
                for index, part in sorted(self.by_source.items())
            },
        )


def evaluate_rows(
    model: nn.Module,
    batches: Iterable[MicroBatch],
    *,
    split: HeadSplit,
    token_losses: TokenLosses,
    vocabulary: int,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Progress | None = None,
    rows: int | None = None,
) -> EvalSums:
    """Sums token losses over batches, in evaluation mode and without gradients.

    Memory is that of one batch: nothing of a batch is kept but three numbers a source.

    Args:
        model: A causal language model, with or without adapters; its mode is put back after.
        batches: Packed or padded micro-batches.
        split: `split_head` of the model before adapters were added.
        token_losses: `glasstune.kernels.linear_cross_entropy.token_losses`.
        vocabulary: Entries of the output head.
        device: Where the model lives.
        precision: Opens the context of each forward (autocast as in training).
        progress: Shows the rows done.
        rows: Their number, for the progress bar.

    Returns:
        The sums. Tokens is 0 where no row has a trained token.
    """
    sums = EvalSums()
    if progress is not None:
        progress.start("evaluate", rows, "rows")
    try:
        with torch.no_grad(), evaluation_mode(model):
            for batch in batches:
                with precision():
                    _add_batch(sums, model, split, batch, token_losses, vocabulary, device)
                if progress is not None:
                    shown: dict[str, float] = {"loss": sums.loss} if sums.tokens else {}
                    progress.advance("evaluate", len(batch.input_ids), **shown)
    finally:
        if progress is not None:
            progress.finish("evaluate")
    return sums


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module's own mode is back after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _add_batch(
    sums: EvalSums,
    model: nn.Module,
    split: HeadSplit,
    batch: MicroBatch,
    token_losses: TokenLosses,
    vocabulary: int,
    device: torch.device,
) -> None:
    targets = batch.targets.reshape(-1)
    trained = targets != IGNORED
    if not trained.any():
        return
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(batch.input_ids).to(device),
        "use_cache": False,
    }
    if batch.packed:
        inputs["position_ids"] = torch.from_numpy(batch.position_ids).to(device)
        inputs.update(packing_kwargs(model, batch.bounds, device))
    else:
        inputs["attention_mask"] = torch.from_numpy(batch.attention_mask).to(device)
    index_N = torch.from_numpy(np.flatnonzero(trained)).to(device)
    targets_N = torch.from_numpy(targets[trained]).to(device)
    # A head that is no separate step (`proven` is false) costs the memory of a batch's logits.
    run = split.hidden if split.proven else split.full_logits
    trained_ND = run(model, **inputs).flatten(0, 1)[index_N]
    head = split.logits if split.proven else _identity
    nll_N, correct_N = token_losses(trained_ND, head, targets_N, vocabulary)

    # Sums in float64 on the host: the order of the rows then shows in no digit that is printed.
    nll = nll_N.double().cpu().numpy()
    correct = correct_N.cpu().numpy()
    source_of = np.array([document.source for document in batch.documents])
    sources = source_of[batch.document_ids.reshape(-1)[trained]]
    for source in np.unique(sources):
        mine = sources == source
        part = (float(nll[mine].sum()), int(correct[mine].sum()), int(mine.sum()))
        sums.by_source.setdefault(int(source), SourceSums()).add(*part)
        sums.add(*part)


def _identity(logits: Tensor) -> Tensor:
    return logits
