"""Bytes of a run from its configuration: weights by formula, activations by a step without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from glasstune.adapters.overlay import moment_bytes
from glasstune.core.recompute import Recompute
from glasstune.models.head import HeadSplit, fold_head
from glasstune.models.inspect.precision import precision_record
from glasstune.models.inspect.source import ModelSource
from glasstune.planner.fp8 import expansion, float8_flops, grown_base, making_bytes
from glasstune.planner.graphs import compiled_bytes
from glasstune.planner.live import ROUND
from glasstune.planner.losses import (
    any_head_loss,
    frozen_head_loss,
    frozen_head_loss_gpu,
    held_out_loss,
)
from glasstune.planner.peak import Activations, Static
from glasstune.planner.shadow import Shadow, make_shadow
from glasstune.planner.trace import (
    Batch,
    Extra,
    Loss,
    block_calls,
    trace_evaluation,
    trace_step,
)
from glasstune.planner.watch import BlockBytes

BUDGETS = (0.9, 0.7, 0.5, 0.3)
"""Shares of their activations that compiled layers may keep, beside all. On Llama's layers: without
copies for LoRA's columns and what the MLP's gate makes; without attention's output; the next two
make one wide product again each."""


@dataclass(frozen=True)
class Setup:
    """How a run is set up, as far as memory depends on it.

    Args:
        source: The base model.
        bits: 16, 8 or 4.
        adapter: Options of the adapter.
        quantization: Options of `BitsAndBytesConfig`.
        dtype: Load dtype.
        int8_compute: `w8a16` or `llm_int8`.
        optim: `adamw_torch` or `adamw_8bit`.
        target: `cpu` or `cuda`: where the run will be.
        fast: Whether layers of one input share a product.
        compiled: Whether blocks are compiled.
        attention: `attn_implementation`, None for the model's own.
        packed: Whether rows hold several documents.
        next_token: Whether next_token is among the losses.
        z_loss: Whether z_loss is.
        extras: Losses beside these two.
        split: Losses that have a backward of their own in an audited update; 0 where none is.
        fp8: Whether products of the base are float8.
        fp8_keep: Patterns of layers that stay as they are then.
    """

    source: ModelSource
    bits: int
    adapter: Mapping[str, Any]
    quantization: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    int8_compute: str = "w8a16"
    optim: str = "adamw_torch"
    target: str = "cpu"
    fast: bool = False
    compiled: bool = False
    attention: str | None = None
    packed: bool = False
    next_token: bool = True
    z_loss: bool = False
    extras: tuple[Extra, ...] = ()
    split: int = 0
    fp8: bool = False
    fp8_keep: tuple[str, ...] = ()


class MemoryModel:
    """Bytes of a run, for any batch and policy.

    Args:
        setup: The run.

    Attributes:
        static: What stays the whole run.
        shadow: The model without data.
        bare_head: Whether the loss may take the head's frozen weight.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.shadow: Shadow = make_shadow(
            setup.source, setup.bits, setup.adapter, quantization=setup.quantization,
            dtype=setup.dtype, int8_compute=setup.int8_compute, target=setup.target,
            fast=setup.fast, attention=setup.attention, packed=setup.packed, fp8=setup.fp8,
            fp8_keep=setup.fp8_keep,
        )  # fmt: skip
        split = HeadSplit(self.shadow.model)
        split.proven = True
        fold_head(self.shadow.model)
        self.bare_head = split.bare
        self.static = self._static()
        self._known: dict[Any, Activations] = {}
        self._compiled: dict[Any, list[tuple[BlockBytes, BlockBytes]]] = {}

    @property
    def layers(self) -> int:
        """Decoder blocks of the real model."""
        return len(self.shadow.stands_for)

    def activations(self, batch: Batch) -> Activations:
        """Returns what a batch does to memory; each is worked out once."""
        key = _key(batch)
        if key not in self._known:
            self._known[key] = self._trace(batch)
        return self._known[key]

    def lighter(self, batch: Batch) -> Activations:
        """Returns the same with what compiled layers keep under each smaller budget.

        Budgets that change nothing are left out; nothing is added where layers are not compiled.
        """
        key, known = _key(batch), self.activations(batch)
        if known.light or key not in self._compiled:
            return known
        kinds, whole = self.shadow.stands_for, self._compiled[key]
        light: dict[float, tuple[list[BlockBytes], list[BlockBytes]]] = {}
        before = sum(whole[kind][0].kept for kind in kinds)
        for budget in BUDGETS:
            pairs = self._compile(batch, budget)
            kept = sum(pairs[kind][0].kept for kind in kinds)
            if kept >= before:
                continue
            before = kept
            light[budget] = (
                [_lighter(known.plain[n], whole[k], pairs[k], 0) for n, k in enumerate(kinds)],
                [_lighter(known.again[n], whole[k], pairs[k], 1) for n, k in enumerate(kinds)],
            )
        self._known[key] = replace(known, light=light)
        return self._known[key]

    def scaled(self, batch: Batch, like: Batch) -> Activations:
        """Returns another batch's activations from those of one like it, in proportion to tokens.

        Weights that are expanded for a moment do not grow with the tokens and are left as they are.
        """
        known = self.activations(like)
        share = batch.tokens / like.tokens
        fixed = self.largest_expansion()

        def grown(size: int, constant: int = 0) -> int:
            constant = min(size, constant)
            return constant + round((size - constant) * share)

        def block(part: BlockBytes) -> BlockBytes:
            return BlockBytes(
                grown(part.kept), grown(part.forward, fixed), grown(part.backward, fixed),
                part.gradients, grown(part.flops), grown(part.again), grown(part.split, fixed),
            )  # fmt: skip

        return replace(
            known,
            before=grown(known.before),
            plain=[block(part) for part in known.plain],
            again=[block(part) for part in known.again],
            entering=grown(known.entering),
            head=grown(known.head),
            head_kept=grown(known.head_kept),
            evaluation=grown(known.evaluation, fixed),
            flops=grown(known.flops),
            beside=grown(known.beside),
            held=grown(known.held),
            split_head=grown(known.split_head),
            light={
                budget: ([block(part) for part in plain], [block(part) for part in again])
                for budget, (plain, again) in known.light.items()
            },
        )

    def largest_expansion(self) -> int:
        """Bytes of the widest weight that is expanded for a moment; 0 at 16 bit."""
        sizes = [0]
        for group in self.shadow.groups:
            if group.kind != "full" and group.fp8:
                sizes.append(0 if group.kind == "fp8" else expansion(group))
            elif group.kind != "full":
                layout = group.layout
                sizes.append(2 * (layout.rows + layout.columns) * (layout.width + layout.columns))
        if not self.shadow.groups and self.setup.bits < 16:
            sizes += [
                2 * module.in_features * module.out_features
                for module in self.shadow.model.modules()
                if isinstance(module, nn.Linear)
                and type(module).__name__ in ("Linear4bit", "Int8Linear", "Linear8bitLt")
            ]
        return max(sizes)

    def float8_flops(self, tokens: int, recompute: Recompute) -> int:
        """Returns the operations of a step's float8 products, as `activations` counts them."""
        forwards = 1 + recompute.layers / max(1, self.layers)
        return float8_flops(self.shadow.groups, self.times, tokens, forwards)

    def loss(self) -> Loss | None:
        """Returns what stands behind the last norm; None where `extras` are all."""
        z = self.setup.z_loss
        if not (z or self.setup.next_token) and self.setup.extras:
            return None
        if not self.bare_head:
            return partial(any_head_loss, z=z)
        if self.setup.target == "cuda" and not z:
            return frozen_head_loss_gpu
        return partial(frozen_head_loss, z=z)

    def _trace(self, batch: Batch) -> Activations:
        shadow, compiled = self.shadow, self.setup.compiled
        loss = self.loss()
        extras, split = self.setup.extras, self.setup.split > 0
        again = trace_step(
            shadow, batch, loss, recompute=True, fused_norms=compiled, extras=extras, split=split
        )
        around = plain = trace_step(shadow, batch, loss, extras=extras, split=split)
        plains, agains = plain.blocks, again.blocks
        notes = ["each layer's operations traced on tensors without data"]
        if compiled:
            try:
                pairs = self._compile(batch)
            except RuntimeError as error:  # of the compiler: a mixture of experts has no one graph
                notes.append(
                    f"the compiler makes no one graph of a layer ({type(error).__name__}): what "
                    "compiling saves is left out"
                )
            else:
                self._compiled[_key(batch)] = pairs
                # Products are the same, whoever makes them.
                plains = [replace(p[0], flops=b.flops) for p, b in zip(pairs, plains, strict=True)]
                agains = [replace(p[1], flops=b.flops) for p, b in zip(pairs, agains, strict=True)]
                # Compiled blocks keep their input, as computed-again ones do: so what is around.
                around = again
                notes = ["each layer's compiled graphs walked buffer by buffer"]
        evaluation = trace_evaluation(shadow, batch, held_out_loss)
        kinds = shadow.stands_for
        return Activations(
            before=around.before,
            plain=[plains[kind] for kind in kinds],
            again=[agains[kind] for kind in kinds],
            entering=agains[-1].kept if agains else 0,
            head=around.head,
            head_kept=around.head_kept,
            evaluation=evaluation,
            flops=around.flops,
            notes=notes,
            beside=around.beside,
            held=around.held,
            split_head=around.split_head,
        )

    def _compile(self, batch: Batch, budget: float = 1.0) -> list[tuple[BlockBytes, BlockBytes]]:
        """Returns each block of the shadow, kept and computed again, as compiled."""
        shadow, donated = self.shadow, self.setup.split == 0
        return [
            compiled_bytes(
                shadow, path, call, round_to=ROUND["cuda"], budget=budget, donated=donated
            )
            for path, call in zip(shadow.blocks, block_calls(shadow, batch), strict=True)
        ]

    def _static(self) -> Static:
        setup = self.setup
        record = precision_record(
            setup.source, setup.bits, setup.quantization, dtype=setup.dtype,
            int8_compute=setup.int8_compute,
        )  # fmt: skip
        adapters = gradients = optimizer = largest = 0
        for name, parameter in self.shadow.model.named_parameters():
            if not parameter.requires_grad:
                continue
            size = parameter.numel() * parameter.element_size()
            count = self.times(name)
            adapters += count * size
            gradients += count * size
            optimizer += count * moment_bytes(parameter.numel(), setup.optim)
            largest = max(largest, size)
        wide = 0
        for group in self.shadow.groups:
            if group.kind == "full" and group.wide is not None:
                kept = group.base_layout.rows * group.base_layout.width
                extra = (group.wide.numel() - kept) * group.wide.element_size()
                wide += self.times(group.paths[0]) * extra
            if group.stays is not None:
                wide += self.times(group.paths[0]) * group.stays.beside(group.layout)
        base, load = record.total_bytes, record.largest_transient_bytes
        if setup.fp8 and setup.bits == 16:
            base += grown_base(self.shadow.model, _ITEM, self.times)
            load = max(load, making_bytes(self.shadow.model, self.shadow.groups))
        return Static(
            base=base,
            wide=wide,
            adapters=adapters,
            gradients=gradients,
            optimizer=optimizer,
            load=load,
            largest=largest,
        )

    def times(self, name: str) -> int:
        """Returns how many blocks of the real model stand behind a name of the shadow."""
        for index, path in enumerate(self.shadow.blocks):
            if name.startswith(f"{path}."):
                return self.shadow.stands_for.count(index)
        return 1


_ITEM = 2
"""Bytes of a weight's entry that float8 replaces: float32 is refused with it."""


def _key(batch: Batch) -> tuple[Any, ...]:
    return (batch.rows, batch.length, batch.trained, batch.masked, batch.bounds)


_Pair = tuple[BlockBytes, BlockBytes]


def _lighter(known: BlockBytes, whole: _Pair, light: _Pair, which: int) -> BlockBytes:
    """Returns a block under a smaller budget.

    Args:
        known: With nothing left out.
        whole: The same kept and computed again, as the compiler's graphs have it.
        light: As the graphs have it under the budget.
        which: 0 where it is kept, 1 where it is computed again.
    """
    return replace(
        light[which],
        flops=known.flops + light[which].flops - whole[which].flops,
        again=max(0, whole[0].kept - light[0].kept),
    )
