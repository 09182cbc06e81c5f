"""Marks as a traced step passes its blocks: how many bytes live then, and how many operations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glasstune.planner.live import LiveBytes


@dataclass
class BlockBytes:
    """What one block does to memory.

    Args:
        kept: Bytes that stay after its forward until its backward.
        forward: Most bytes above those at its start, while its forward runs.
        backward: Most bytes above those kept by the blocks before it and by the loss, while its
            backward runs (its own kept ones and gradients of its adapters included).
        gradients: Bytes of the gradients of its trained tensors.
        flops: Floating point operations of its forwards and its backward.
        again: Bytes that are made again although they are no product's: written and read once more.
        split: Most bytes above all that is kept, while its backward runs and lets nothing go
            because another backward follows (gradients of its adapters included).
    """

    kept: int
    forward: int
    backward: int
    gradients: int
    flops: int = 0
    again: int = 0
    split: int = 0


@dataclass
class StepBytes:
    """What a step does to memory, by where it happens.

    Args:
        before: Bytes alive when the first block begins (inputs, embeddings, positions, masks).
        blocks: Of each block of the shadow.
        head_kept: Kept after the last block until the loss (final norm, chosen rows).
        head: Most bytes above those kept by the blocks, until the last block's backward begins.
        beside: What lives through the whole backward beside what the blocks keep: tensors that the
            losses were given, less what the model's own forward let go at its end.
        held: Kept after the last block once every loss is there, before any backward.
        split_head: Most bytes above those kept by the blocks, while a backward that lets nothing
            go runs through the losses.
        flops: Operations outside the blocks.
    """

    before: int
    blocks: list[BlockBytes]
    head_kept: int
    head: int
    beside: int = 0
    held: int = 0
    split_head: int = 0
    flops: int = 0


class Watch:
    """Takes marks as forward and backward pass the blocks.

    Args:
        live: Counts the bytes.
        blocks: The blocks.
        masked: Whether a real run has a mask.
        capture: Whether the arguments of the blocks are kept.
    """

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
        self.split: dict[int, int] = {}
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.head_kept = self.head = self.beside = self.held = self.split_head = 0
        self._handles: list[Any] = []
        self._open: int | None = None
        self._pass: int | None = None
        self._again = 0
        self._loss_peak = 0
        self.gradients = [
            sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad)
            for block in blocks
        ]

    def __enter__(self) -> Watch:
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
        if len(self.starts) > index:  # a loss's own forward, without gradients
            self._again = self.live.flops
            return args, kwargs
        self.live.restart()
        self._since = self.live.flops
        self.starts.append(self.live.now)
        if self.capture:
            self.calls.append((args, {**kwargs}))
        return args, kwargs

    def _end(self, index: int, _: nn.Module, args: Any, out: Any) -> None:
        if len(self.ends) > index:
            self.flops[index] += self.live.flops - self._again
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

    def at_losses(self) -> None:
        """Notes what is kept once every loss is there."""
        self.held = self.live.now - self.ends[-1]
        self._loss_peak = self.live.peak

    def run_split(self, losses: list[Tensor], trained: list[Tensor]) -> None:
        """Runs a backward for each loss, as an audited update does, and lets nothing go."""
        flops = self.live.flops
        for loss in losses:
            self._pass, self._open = self.live.now, None
            self.live.restart()
            found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            self._close()
            del found
        self.live.flops = flops  # few updates are audited
        self._pass = self._open = None
        self.live.restart()

    def _reached(self, index: int, grad: Tensor) -> None:
        """The gradient has come to a block's output: the block after it is done."""
        if self._open is None and self._pass is None:
            self.beside = self.live.now - self.ends[-1] - _size(grad, self.live)
        self._close()
        self._open = index
        self._since = self.live.flops
        self.live.restart()

    def _close(self) -> None:
        if self._pass is not None:
            self._close_split(self._pass)
        elif self._open is None:
            self.head = max(self.live.peak, self._loss_peak) - self.ends[-1]
        else:
            self.backward[self._open] = self.live.peak
            self.flops[self._open] += self.live.flops - self._since

    def _close_split(self, start: int) -> None:
        if self._open is None:
            self.split_head = max(self.split_head, self.live.peak - self.ends[-1])
            return
        later = sum(self.gradients[self._open + 1 :])
        above = self.live.peak - start - later
        self.split[self._open] = max(self.split.get(self._open, 0), above)

    def result(self) -> StepBytes:
        """Returns the bytes by block."""
        found = []
        later = 0
        for index in reversed(range(len(self.blocks))):
            start, own = self.starts[index], self.gradients[index]
            back = self.backward.get(index, start + later + self.beside)
            found.append(
                BlockBytes(
                    self.ends[index] - start, self.forward[index],
                    back - start - later - self.beside, own, self.flops[index],
                    split=self.split.get(index, 0),
                )
            )  # fmt: skip
            later += own
        return StepBytes(
            self.starts[0] - self.mask, found[::-1], self.head_kept + self.mask,
            self.head + self.mask, self.beside + self.mask, self.held + self.mask,
            self.split_head + self.mask, self.live.flops - sum(self.flops),
        )  # fmt: skip


def _rounded(size: int, live: LiveBytes) -> int:
    return -(-size // live.round_to) * live.round_to


def _size(tensor: Tensor, live: LiveBytes) -> int:
    return _rounded(tensor.untyped_storage().nbytes(), live)
