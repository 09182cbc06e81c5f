"""Held-out loss while training: one number whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable

import torch

from glasstune.core.batch import IGNORED
from glasstune.core.errors import RunError
from glasstune.core.protocols import Progress
from glasstune.data.loader import evaluation_batches
from glasstune.data.packing import PackedSet
from glasstune.kernels.linear_cross_entropy import token_losses
from glasstune.training.inputs import to_device
from glasstune.training.step import AdaptedModel


@torch.no_grad()
def heldout_loss(
    adapted: AdaptedModel,
    data: PackedSet,
    rows: int,
    pad_id: int,
    progress: Progress,
    check: Callable[[], None],
) -> tuple[float, int]:
    """Sum of token losses over trained tokens of the whole set.

    Memory does not depend on the number of rows: only two numbers are kept. Random states are
    left as they were.

    Args:
        adapted: The model; its train/eval mode is restored.
        data: Validation rows.
        rows: Rows of a forward.
        pad_id: Padding token.
        progress: Shows a bar.
        check: Called between batches; may raise to interrupt.

    Returns:
        (mean loss in nats, number of trained tokens).

    Raises:
        RunError: The loss is not finite.
    """
    task = "evaluate"
    was_training = adapted.model.training
    adapted.model.eval()
    progress.start(task, data.rows, "rows")
    total = torch.zeros((), dtype=torch.float64, device=adapted.device)  # read once, at the end
    count = 0
    try:
        with torch.random.fork_rng(devices=[], enabled=True):
            for batch in evaluation_batches(data, rows, pad_id):
                check()
                with adapted.precision():
                    hidden = adapted.trained_hidden(batch, 0)
                    flat = batch.targets.reshape(-1)
                    targets = to_device(torch.from_numpy(flat[flat != IGNORED]), adapted.device)
                    losses, _ = token_losses(hidden, adapted.head, targets, adapted.vocabulary)
                total += losses.sum(dtype=torch.float64)
                count += len(targets)
                progress.advance(task, len(batch.bounds))
    finally:
        progress.finish(task)
        adapted.model.train(was_training)
    loss = float(total) / count if count else float("nan")
    if not abs(loss) < float("inf"):
        raise RunError(
            "non_finite_eval_loss",
            f"the held-out loss is {loss} over {count} tokens",
            fix="lower the learning rate or train in bfloat16 or float32",
        )
    return loss, count
