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
from glasstune.training.distributed import ALONE, World
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
    world: World = ALONE,
) -> tuple[float, int]:
    """Sum of token losses over trained tokens of the whole set.

    Batches are divided over the ranks and their sums added in the order of the batches, so any
    number of ranks gives the same bits. One number a batch is kept. Random states are left as they
    were.

    Args:
        adapted: The model; its train/eval mode is restored.
        data: Validation rows.
        rows: Rows of a forward.
        pad_id: Padding token.
        progress: Shows a bar.
        check: Called between batches; may raise to interrupt.
        world: The ranks of the run.

    Returns:
        (mean loss in nats, number of trained tokens).

    Raises:
        RunError: The loss is not finite.
    """
    task = "evaluate"
    was_training = adapted.model.training
    adapted.model.eval()
    progress.start(task, data.rows, "rows")
    every = -(-data.rows // rows)
    sums = torch.zeros(  # read once, at the end
        -(-every // world.size), dtype=torch.float64, device=adapted.device
    )
    count = done = 0
    try:
        with torch.random.fork_rng(devices=[], enabled=True):
            for batch in evaluation_batches(data, rows, pad_id, first=world.rank, every=world.size):
                check()
                with adapted.precision():
                    hidden = adapted.trained_hidden(batch, 0)
                    flat = batch.targets.reshape(-1)
                    targets = to_device(torch.from_numpy(flat[flat != IGNORED]), adapted.device)
                    losses, _ = token_losses(hidden, adapted.head, targets, adapted.vocabulary)
                sums[done] = losses.sum(dtype=torch.float64)
                done += 1
                count += len(targets)
                progress.advance(task, len(batch.bounds))
            if adapted.sharded:
                adapted.keep_step(len(sums) - done)
    finally:
        progress.finish(task)
        adapted.model.train(was_training)
    by_rank = world.gather(sums.tolist())
    count = int(world.sum([count])[0])
    total = 0.0
    for number in range(every):
        total += by_rank[number % world.size][number // world.size]
    loss = total / count if count else float("nan")
    if not abs(loss) < float("inf"):
        raise RunError(
            "non_finite_eval_loss",
            f"the held-out loss is {loss} over {count} tokens",
            fix="lower the learning rate or train in bfloat16 or float32",
        )
    return loss, count
