"""What the audit costs inside training: the same updates with and without it, one after the other.

    python bench/audit_overhead.py MODEL DATA [--updates 12] [--terms 3] [--tokens 512]

MODEL is a folder, hub id or GGUF file; DATA a file of rows. Three kinds of update are timed in
turns in one process, on the same rows: `plain` (no audit), `norms` (what every update of the
default setting pays: the norms of all trained tensors, one row of `audit.jsonl`), `by term` (what
every 50th pays). The overhead of the default setting is (49 norms + 1 by term) / 50 plain - 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

EVERY = 50
TERMS = [
    {"name": "next_token"},
    {"name": "z_loss", "weight": 0.001},
    {"name": "kl_to_base", "weight": 0.1},
]


class Quiet:
    """A progress that says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--terms", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--bits", type=int, default=16)
    options = parser.parse_args()

    import torch

    from glasstune.audit.live import LiveAudit
    from glasstune.core.choices import Choices
    from glasstune.core.config_load import config_from_mapping
    from glasstune.training.batching import updates
    from glasstune.training.step import compute_update
    from glasstune.workflows.prepare_run import prepare
    from glasstune.workflows.trained_model import open_trained

    config = config_from_mapping(
        {
            "model": {"path": options.model, "bits": options.bits},
            "data": {"sources": [{"path": options.data}], "max_length": options.tokens},
            "losses": TERMS[: options.terms],
            "training": {"train_batch_size": 4, "max_steps": 1000},
        }
    ).config
    prepared = prepare(config, Choices(), Quiet())
    adapted, parameters, optimizer = open_trained(prepared, lambda finding: None)
    adapted.model.train()
    folder = Path(tempfile.mkdtemp())
    audit = LiveAudit(adapted.model, optimizer, folder, every=EVERY)

    def once(update: Any, step: int, hook: LiveAudit | None) -> float:
        """Seconds of one update without the optimiser's step, which no audit touches."""
        if adapted.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        hooks = () if hook is None else (hook,)
        for each in hooks:
            each.before_update(step)
        compute_update(
            adapted, prepared.terms, update.micro_batches, step, update.epoch, hooks,
            counting=hook, check=False,
        )  # fmt: skip
        for each in hooks:
            each.after_backward(step, adapted.model, optimizer)
            each.after_update(step, adapted.model, 1e-4)
        if adapted.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        optimizer.zero_grad(set_to_none=True)
        return seconds

    stream = updates(prepared.schedule, prepared.data.train, 0, 0, 0, 0, prepared.pad_id)
    gc.collect()
    gc.freeze()  # as the loop does
    kinds: dict[str, list[float]] = {"plain": [], "norms": [], "by term": []}
    number = 0
    for turn, update in zip(range(options.updates + 2), stream, strict=False):
        order = list(kinds) if turn % 2 else list(reversed(kinds))
        for kind in order:
            number += 1
            step = {"plain": number, "norms": EVERY * number + 1, "by term": EVERY * number}[kind]
            seconds = once(update, step, None if kind == "plain" else audit)
            if turn >= 2:  # the first two look at the structure and warm up
                kinds[kind].append(seconds)
    audit.close()
    plain = statistics.median(kinds["plain"])
    # Paired with the plain update of the same rows: rows differ in length.
    norms_cost, split_cost = (
        statistics.median(b / a for a, b in zip(kinds["plain"], kinds[kind], strict=True))
        for kind in ("norms", "by term")
    )
    overhead = ((EVERY - 1) * norms_cost + split_cost) / EVERY - 1
    print(f"torch {torch.__version__}, {adapted.device}, {torch.get_num_threads()} threads")
    print(f"{len(parameters)} trained tensors, {options.terms} terms, {options.bits} bit")
    print(f"plain {plain:.3f} s, norms {norms_cost - 1:+.2%}, by term {split_cost - 1:+.1%}")
    print(f"overhead of the default setting (by term every {EVERY}): {overhead:+.2%}")
    row = {"plain": plain, "norms": norms_cost, "by_term": split_cost, "overhead": overhead}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
