"""A step on tensors without data, taken down block by block.

Under autograd an operation saves what its backward needs; here nobody has to know what. Kept
activations, buffers of a moment and gradients come out as a real step has them, at the real types.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from glasstune.adapters.base import base_only
from glasstune.kernels.document_attention import op as document_attention
from glasstune.models.families import documents, flex
from glasstune.models.families.experts import grouped_of_any_type
from glasstune.models.families.table import family_of
from glasstune.planner.live import ROUND, LiveBytes
from glasstune.planner.shadow import Shadow
from glasstune.planner.watch import StepBytes, Watch

Loss = Callable[[Tensor, nn.Module], Tensor]
"""(hidden [trained, d], the model's head) -> a scalar with a graph."""

Extra = Callable[["Behind"], Tensor]
"""A loss that needs more than that -> a scalar with a graph."""


@dataclass(frozen=True)
class Behind:
    """What a loss term finds behind the last norm.

    Args:
        hidden: [trained, d], with graph.
        head: The model's head.
        base: Runs the backbone with every adapter off, once: [trained, d], no graph.
        adapters_off: Opens a context in which every adapter is off.
    """

    hidden: Tensor
    head: nn.Module
    base: Callable[[], Tensor]
    adapters_off: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Batch:
    """The shape of a batch.

    Args:
        rows: Its rows.
        length: Tokens of a row.
        trained: Positions that reach the loss; None takes all without choosing.
        masked: Whether attention gets a mask (padding, or documents kept apart by one).
        bounds: Per row the cumulative ends of its documents, where attention runs over those.
    """

    rows: int
    length: int
    trained: int | None = None
    masked: bool = False
    bounds: tuple[tuple[int, ...], ...] | None = None

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.length


def with_rows(batch: Batch, rows: int) -> Batch:
    """Returns a batch of the same length and another number of rows."""
    trained = None if batch.trained is None else max(1, batch.trained * rows // batch.rows)
    bounds = None
    if batch.bounds is not None:
        bounds = tuple(batch.bounds[index % batch.rows] for index in range(rows))
    return Batch(rows, batch.length, trained, batch.masked, bounds)


def trace_step(
    shadow: Shadow, batch: Batch, loss: Loss | None, *, recompute: bool = False,
    fused_norms: bool = False, extras: Sequence[Extra] = (), split: bool = False,
) -> StepBytes:  # fmt: skip
    """Runs a step and takes its memory down.

    Args:
        shadow: The model.
        batch: What goes through it.
        loss: What stands behind the last norm; None where `extras` are all.
        recompute: Whether every block is computed again in the backward.
        fused_norms: Whether normalisations beside the blocks are compiled: they then save their
            input and a number a row, and need no buffer.
        extras: Losses beside it.
        split: Whether each loss has a backward of its own first, as an audited update has.
    """
    with shadow.mode, grouped_of_any_type():
        trained_tensors = [p for p in shadow.model.parameters() if p.requires_grad]
        blocks = [shadow.model.get_submodule(path) for path in shadow.blocks]
        live = _counter(shadow)
        watch = Watch(live, blocks, batch.masked)
        undo = [_recomputing(blocks)] if recompute else []
        if fused_norms:
            undo.append(_fusing([shadow.model.get_submodule(path) for path in shadow.norms]))
        try:
            with live, watch:
                with shadow.precision():
                    given = _behind(shadow, batch)
                    watch.at_head()
                    losses = [] if loss is None else [loss(given.hidden, given.head)]
                    losses += [extra(given) for extra in extras]
                watch.at_losses()
                if split:
                    watch.run_split(losses, trained_tensors)
                # What the losses were given stays until the update is done.
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
                del given, losses
        finally:
            for step in undo:
                step()
            for parameter in trained_tensors:
                parameter.grad = None
            _forget_masks()
        return watch.result()


def _behind(shadow: Shadow, batch: Batch) -> Behind:
    @functools.cache
    def base() -> Tensor:
        with torch.no_grad(), base_only(shadow.model):
            return _forward(shadow, batch)[0]

    hidden, head = _forward(shadow, batch)
    return Behind(hidden, head, base, lambda: base_only(shadow.model))


def trace_evaluation(shadow: Shadow, batch: Batch, loss: Loss) -> int:
    """Returns the most bytes that live while a batch is evaluated."""
    with shadow.mode, torch.no_grad(), grouped_of_any_type():
        live = _counter(shadow)
        blocks = [shadow.model.get_submodule(path) for path in shadow.blocks]
        shadow.model.eval()
        try:
            with live, Watch(live, blocks, batch.masked):
                hidden, head = _forward(shadow, batch)
                with shadow.precision():
                    loss(hidden, head)
        finally:
            shadow.model.train()
            _forget_masks()
        return live.most


def block_calls(shadow: Shadow, batch: Batch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Returns the arguments with which each block is called in training."""
    with shadow.mode, torch.no_grad():
        blocks = [shadow.model.get_submodule(path) for path in shadow.blocks]
        live = _counter(shadow)
        watch = Watch(live, blocks, batch.masked, capture=True)
        with live, watch:
            _forward(shadow, batch)
        _forget_masks()
        return watch.calls


def _forget_masks() -> None:
    """Takes masks without data out of the cache that real attention uses."""
    document_attention._minus_infinity.cache_clear()


def _counter(shadow: Shadow) -> LiveBytes:
    live = LiveBytes(ROUND[shadow.target], shadow.target == "cuda")
    for tensor in _held(shadow):
        live.know(tensor)
    for parameter in shadow.model.parameters():
        parameter.grad = None
    return live


def _held(shadow: Shadow) -> list[Tensor]:
    found: list[Tensor] = [*shadow.model.parameters(), *shadow.model.buffers()]
    for group in shadow.groups:
        found += [] if group.wide is None else [group.wide]
        found += [] if group.stays is None else group.stays.tensors()
    for module in shadow.model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                found += [value for value in vars(part).values() if isinstance(value, Tensor)]
    return found


def _forward(shadow: Shadow, batch: Batch) -> tuple[Tensor, nn.Module]:
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(batch.rows, batch.length, dtype=torch.int64, device=shadow.device),
        "use_cache": False,
    }
    if batch.bounds is not None:
        inputs |= {"attention_mask": None, documents.BOUNDS_KEYWORD: batch.bounds}
    causal = shadow.model.get_base_model()
    if batch.bounds is None and not batch.masked and _needs_no_mask(causal.config):
        inputs["attention_mask"] = flex.no_mask(shadow.device)
    if "position_ids" in inspect.signature(causal.base_model.forward).parameters:
        places = torch.arange(batch.length, device=shadow.device)
        inputs.setdefault("position_ids", places.expand(batch.rows, -1).contiguous())
    with shadow.precision():
        hidden: Tensor = causal.base_model(**inputs, return_dict=True)[0]
        hidden = hidden.flatten(0, 1)
        if batch.trained is not None:
            hidden = hidden[torch.zeros(batch.trained, dtype=torch.int64, device=shadow.device)]
    return hidden, causal.get_output_embeddings()


def _needs_no_mask(config: Any) -> bool:
    """Whether a real forward sees that causal attention needs no mask; without data it cannot."""
    family = family_of(config)
    causal = family is not None and (family.packing, family.positions) == ("documents", "rope")
    whole = getattr(config, "sliding_window", None) is None
    return causal and whole and config._attn_implementation == "sdpa"


class _FusedNorm(torch.autograd.Function):
    """What a compiled normalisation keeps: its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the normalised tensor."""
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        """Returns dx."""
        x, _ = ctx.saved_tensors
        return torch.empty_like(x), None


def _fusing(norms: list[nn.Module]) -> Callable[[], None]:
    for norm in norms:
        norm.forward = partial(_fused_norm, norm.forward)

    def undo() -> None:
        for norm in norms:
            del norm.forward

    return undo


def _fused_norm(plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        dtype = plain(x[..., :1, :]).dtype
    out: Tensor = _FusedNorm.apply(x, dtype)  # type: ignore[no-untyped-call]
    return out


def _recomputing(blocks: list[nn.Module]) -> Callable[[], None]:
    for block in blocks:
        plain: Any = block.forward

        def again(*args: Any, _plain: Any = plain, **kwargs: Any) -> Any:
            return checkpoint.checkpoint(
                _plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

        block.forward = again

    def undo() -> None:
        for block in blocks:
            del block.forward
        gc.collect()

    return undo
