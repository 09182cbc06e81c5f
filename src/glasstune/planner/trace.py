"""A step on tensors without data, taken down block by block.

Under autograd an operation saves what its backward needs; here nobody has to know what. Kept
activations, buffers of a moment and gradients come out as a real step has them, at the real types.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from glasstune.kernels.document_attention import op as document_attention
from glasstune.models.families import documents
from glasstune.models.families.experts import grouped_of_any_type
from glasstune.planner.live import ROUND, LiveBytes
from glasstune.planner.shadow import Shadow


@dataclass
class BlockBytes:
    """What one block does to memory.

    Args:
        kept: Bytes that stay after its forward until its backward.
        forward: Most bytes above those at its start, while its forward runs.
        backward: Most bytes above those kept by the blocks before it, while its backward runs
            (its own kept ones and gradients of its adapters included).
        gradients: Bytes of the gradients of its trained tensors.
        flops: Floating point operations of its forward and its backward.
        again: Bytes that are made again although they are no product's: written and read once more.
    """

    kept: int
    forward: int
    backward: int
    gradients: int
    flops: int = 0
    again: int = 0


@dataclass
class StepBytes:
    """What a step does to memory, by where it happens.

    Args:
        before: Bytes alive when the first block begins (inputs, embeddings, positions, masks).
        blocks: Of each block of the shadow.
        head_kept: Kept after the last block until the loss (final norm, chosen rows).
        head: Most bytes above those kept by the blocks, until the last block's backward begins.
        flops: Operations outside the blocks.
    """

    before: int
    blocks: list[BlockBytes]
    head_kept: int
    head: int
    flops: int = 0


Loss = Callable[[Tensor, nn.Module], Tensor]
"""(hidden [trained, d], the model's head) -> a scalar with a graph."""


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
    shadow: Shadow, batch: Batch, loss: Loss, *, recompute: bool = False, fused_norms: bool = False
) -> StepBytes:
    """Runs a step and takes its memory down.

    Args:
        shadow: The model.
        batch: What goes through it.
        loss: What stands behind the last norm.
        recompute: Whether every block is computed again in the backward.
        fused_norms: Whether normalisations beside the blocks are compiled: they then save their
            input and a number a row, and need no buffer.
    """
    with shadow.mode, grouped_of_any_type():
        trained_tensors = [p for p in shadow.model.parameters() if p.requires_grad]
        blocks = [shadow.model.get_submodule(path) for path in shadow.blocks]
        live = _counter(shadow)
        watch = _Watch(live, blocks, batch.masked)
        undo = [_recomputing(blocks)] if recompute else []
        if fused_norms:
            undo.append(_fusing([shadow.model.get_submodule(path) for path in shadow.norms]))
        try:
            with live, watch:
                hidden, head = _forward(shadow, batch)
                watch.at_head()
                with shadow.precision():
                    total = loss(hidden, head)
                del hidden
                total.backward()  # type: ignore[no-untyped-call]
        finally:
            for step in undo:
                step()
            for parameter in trained_tensors:
                parameter.grad = None
            _forget_masks()
        return watch.result()


def trace_evaluation(shadow: Shadow, batch: Batch, loss: Loss) -> int:
    """Returns the most bytes that live while a batch is evaluated."""
    with shadow.mode, torch.no_grad(), grouped_of_any_type():
        live = _counter(shadow)
        blocks = [shadow.model.get_submodule(path) for path in shadow.blocks]
        shadow.model.eval()
        try:
            with live, _Watch(live, blocks, batch.masked):
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
        watch = _Watch(live, blocks, batch.masked, capture=True)
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
    if "position_ids" in inspect.signature(causal.base_model.forward).parameters:
        places = torch.arange(batch.length, device=shadow.device)
        inputs.setdefault("position_ids", places.expand(batch.rows, -1).contiguous())
    with shadow.precision():
        hidden: Tensor = causal.base_model(**inputs, return_dict=True)[0]
        hidden = hidden.flatten(0, 1)
        if batch.trained is not None:
            hidden = hidden[torch.zeros(batch.trained, dtype=torch.int64, device=shadow.device)]
    return hidden, causal.get_output_embeddings()


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


class _Watch:
    """Takes marks as forward and backward pass the blocks."""

    def __init__(
        self, live: LiveBytes, blocks: list[nn.Module], masked: bool, capture: bool = False
    ) -> None:
        self.live = live
        self.capture = capture
        self.masked = masked
        self.mask = 0
        self.blocks = blocks
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.forward: list[int] = []
        self.flops = [0] * len(blocks)
        self._since = 0
        self.backward: dict[int, int] = {}
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.head_kept = self.head = 0
        self._handles: list[Any] = []
        self._open: int | None = None

    def __enter__(self) -> _Watch:
        for index, block in enumerate(self.blocks):
            self._handles += [
                block.register_forward_pre_hook(partial(self._begin, index), with_kwargs=True),
                block.register_forward_hook(partial(self._end, index)),
            ]
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # else the error is what matters: nothing is complete
            self._close()
        for handle in self._handles:
            handle.remove()

    def _begin(self, index: int, _: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        # ALiBi's penalty, one for each head, is real but on a GPU, whose kernel makes it itself.
        own = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1
        own = own and not self.live.cuda
        if not self.masked and not own and isinstance(mask, Tensor) and mask.dim() == 4:
            # Without data transformers cannot see that no mask is needed, and makes one.
            self.mask = _rounded(mask.untyped_storage().nbytes(), self.live)
            kwargs = {**kwargs, "attention_mask": None}
        if len(self.starts) > index:  # computed again in the backward
            return args, kwargs
        self.live.restart()
        self._since = self.live.flops
        self.starts.append(self.live.now)
        if self.capture:
            self.calls.append((args, {**kwargs}))
        return args, kwargs

    def _end(self, index: int, _: nn.Module, args: Any, out: Any) -> None:
        if len(self.ends) > index:
            return
        self.forward.append(self.live.peak - self.starts[index])
        self.flops[index] += self.live.flops - self._since
        self.live.restart()
        self.ends.append(self.live.now)
        # The loop over the blocks still holds this one's input until the next operation.
        self.live.then = partial(self._left, index)
        first = out if isinstance(out, Tensor) else out[0]
        if first.requires_grad:
            first.register_hook(partial(self._reached, index))

    def _left(self, index: int) -> None:
        self.live.restart()
        self.ends[index] = self.live.now

    def at_head(self) -> None:
        """Notes what is kept when the loss begins."""
        self.head_kept = self.live.now - self.ends[-1]

    def _reached(self, index: int, grad: Tensor) -> None:
        """The gradient has come to a block's output: the block after it is done."""
        self._close()
        self._open = index
        self._since = self.live.flops
        self.live.restart()

    def _close(self) -> None:
        if self._open is None:
            self.head = self.live.peak - self.ends[-1]
        else:
            self.backward[self._open] = self.live.peak
            self.flops[self._open] += self.live.flops - self._since

    def result(self) -> StepBytes:
        """Returns the bytes by block."""
        found = []
        later = 0
        grads = [
            sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad)
            for block in self.blocks
        ]
        for index in reversed(range(len(self.blocks))):
            kept = self.ends[index] - self.starts[index]
            back = self.backward.get(index, self.starts[index] + later) - self.starts[index] - later
            found.append(
                BlockBytes(kept, self.forward[index], back, grads[index], self.flops[index])
            )
            later += grads[index]
        return StepBytes(
            self.starts[0] - self.mask, found[::-1], self.head_kept + self.mask,
            self.head + self.mask, self.live.flops - sum(self.flops),
        )  # fmt: skip


def _rounded(size: int, live: LiveBytes) -> int:
    return -(-size // live.round_to) * live.round_to


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
