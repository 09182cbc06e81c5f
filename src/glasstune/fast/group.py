"""A group of adapted layers with one input, computed as one product.

Before each forward the group looks at its members (`look`): PEFT's switches, the adapter's values,
where the base's weights lie. What it finds decides how the call is computed, so merging, switching
off, loading, another adapter or another device are seen without being told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from glasstune.adapters.lora_layers import LoraState, Way, lora_state
from glasstune.fast.bases import (
    Kind,
    asks_fp8,
    base_key,
    is_sharded,
    out_features,
    packed_source,
    put_rows,
    rows_of,
)
from glasstune.fast.fp8_home import Fp8Home
from glasstune.fast.fp8_packed import PackedFp8Home
from glasstune.kernels.expand import Packed4bit, PackedInt8
from glasstune.kernels.fp8 import fp8_base, fp8_group
from glasstune.kernels.lora_group import Layout, base_group, lora_group, write_adapters

_ORDER: dict[Way, int] = {"wide": 0, "grouped": 1, "plain": 2}


class Group:
    """Members that take the very same tensor.

    Args:
        paths: Of the members, in call order.
        layers: PEFT's LoRA layers.
        kind: What their bases hold, the same for all.

    Attributes:
        way: How the present call is computed.
        reason: Why it is not `wide`.
        open: Set while a compiled region of ours runs, which has looked before it.
    """

    def __init__(self, paths: Sequence[str], layers: Sequence[nn.Module], kind: Kind) -> None:
        self.paths = list(paths)
        self.layers: list[Any] = list(layers)
        self.kind = kind
        self.way: Way = "plain"
        self.reason = "not called yet"
        self.open = False
        self.bases = [layer.get_base_layer() for layer in self.layers]
        # bitsandbytes writes into a module whose gathered weight it sees, which breaks a graph.
        self.gathered = kind == "4bit" and any(is_sharded(base.weight) for base in self.bases)
        self.base_layout = Layout(
            self._width(), tuple(out_features(base) for base in self.bases), (), ()
        )
        self.layout = self.base_layout
        self.wide: Tensor | None = None
        self.source: Packed4bit | PackedInt8 | None = None
        self.home: Fp8Home | PackedFp8Home | None = None
        self.fp8 = kind == "fp8" or asks_fp8(self.bases[0])
        self.downs: list[Tensor] = []
        self.ups: list[Tensor] = []
        self.keep_dtype = kind == "4bit"
        self._rows: Tensor | None = None  # W in M, with a version of its own
        self._places: list[int] = []
        self._seen: list[Any] = []
        self._versions: list[tuple[int, int]] = []
        self._unsure = True
        self.x: Tensor | None = None
        self.outs: tuple[Tensor, ...] | None = None
        self.taken: list[bool] = [False] * len(self.layers)
        self.with_grad = False
        self.version = -1

    def look(self, in_training: bool = False) -> None:
        """Decides how the next call is computed, and brings M up to date.

        Args:
            in_training: Takes the members for training ones whatever their mode is.
        """
        states = [lora_state(layer, in_training) for layer in self.layers]
        worst = max(states, key=lambda state: _ORDER[state.way])
        self.way, self.reason = worst.way, worst.reason
        own = self.gathered or (self.fp8 and self.kind != "fp8")
        if self.way == "grouped" and len(self.layers) == 1 and not own:
            self.way = "plain"  # a product of one base is PEFT's own
        if self.way == "wide":
            self._bind(states)
        if self.way != "plain":
            self._look_at_bases()
        if self.way == "wide" and (self.wide is not None or self.home is not None):
            self._refresh()

    def takes(self, x: Tensor) -> bool:
        """Whether an input suits; PEFT's own forward says what is wrong with one that does not."""
        if x.shape[-1] != self.base_layout.width or not x.is_floating_point():
            return False
        if self.kind == "fp8":
            return True
        if self.wide is None:
            # bitsandbytes has a kernel for one token, which need not expand the weight.
            one = x.numel() == x.shape[-1] and not torch.is_grad_enabled()
            return not (one and self.kind == "4bit")
        return x.dtype == self.wide.dtype or torch.is_autocast_enabled(x.device.type)

    def holds(self, x: Tensor, index: int) -> bool:
        """Whether outputs are there of this very tensor, as it is now, for this member to take."""
        return self.x is x and not self.taken[index] and self.version == _version(x)

    def take(self, x: Tensor, index: int) -> Tensor:
        """Returns one member's output; the first to ask has all of them computed."""
        fresh = self.x is not x or self.taken[index]
        if fresh or self.outs is None or self.with_grad != torch.is_grad_enabled():
            self.outs = self._product(x)
            self.x = x
            self.with_grad = torch.is_grad_enabled()
            self.taken = [False] * len(self.taken)
            if not torch.compiler.is_compiling():
                self.version = _version(x)
        out = self.outs[index]
        self.taken[index] = True
        if all(self.taken):
            self.leave()
        return out

    def leave(self) -> None:
        """Lets go of a call's tensors."""
        self.x = self.outs = None
        self.taken = [False] * len(self.taken)

    def release(self) -> None:
        """Gives the base's weights memory of their own again."""
        self.leave()
        if self.wide is not None:
            for base, place in zip(self._present_bases(), self._places, strict=True):
                if base.weight.data_ptr() == place:
                    base.weight.data = base.weight.data.contiguous()
        if self.home is not None:
            self.home.release(self._present_bases())
        self.wide = self._rows = self.home = None
        self._places, self._versions, self._seen = [], [], []

    def _product(self, x: Tensor) -> tuple[Tensor, ...]:
        dtype = self._dtype(x)
        given, bias = x.to(dtype), self._bias(dtype, x.device)
        with torch.autocast(x.device.type, enabled=False):
            if self.home is not None:
                outs = self._fp8_product(given, bias)
            elif self.way == "wide":
                wide = self.source if self.wide is None else self.wide.to(dtype)
                assert wide is not None
                outs = lora_group(given, wide, bias, self.layout, self.downs, self.ups)
            else:
                weight = self.source if self._rows is None else self._rows.to(dtype)
                assert weight is not None
                outs = base_group(given, weight, bias, self.base_layout)
        keep = self.keep_dtype or not torch.is_autocast_enabled(x.device.type)
        return tuple(out.to(x.dtype) for out in outs) if keep else outs

    def _fp8_product(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        home = self.home
        assert home is not None
        if self.way == "wide":
            return fp8_group(x, home.weights, home.low, bias, self.layout, self.downs, self.ups)
        return fp8_base(x, home.plain, bias, self.base_layout)

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Returns the type of the products, as PEFT and the base's own forward have it."""
        if self.fp8:
            return torch.bfloat16  # the only one that tensor cores give of float8 rows
        if self.kind == "4bit":
            return self.bases[0].compute_dtype or x.dtype
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

    def _bias(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        biases: list[Tensor | None] = [base.bias for base in self.bases]
        if all(bias is None for bias in biases):
            return None
        if biases[0] is not None and len(biases) == 1:
            return biases[0].to(dtype)
        rows = zip(biases, self.base_layout.outs, strict=True)
        return torch.cat(
            [
                torch.zeros(size, dtype=dtype, device=device) if bias is None else bias.to(dtype)
                for bias, size in rows
            ]
        )

    def _width(self) -> int:
        base = self.bases[0]
        return int(rows_of(base).shape[1]) if self.kind == "full" else int(base.in_features)

    def _present_bases(self) -> list[Any]:
        self.bases = [layer.get_base_layer() for layer in self.layers]
        return self.bases

    def _look_at_bases(self) -> None:
        """Sees whether the bases are what they were, and if not, what they are now."""
        if any(is_sharded(base.weight) for base in self._present_bases()):
            return  # outside a call: within one FSDP2 has gathered them
        seen = [_signature(base, self.kind) for base in self.bases]
        if seen == self._seen:
            return
        self._seen = []
        keys = [base_key(base, set()) for base in self.bases]
        refused = [key for key in keys if isinstance(key, str)]
        if refused or len(set(keys)) > 1:
            self.way = "plain"
            self.reason = refused[0] if refused else "its members are no longer of one kind"
            return
        if self.kind == "full":
            self._adopt()
        elif self.kind == "fp8":
            self.home, self._versions = Fp8Home(self.bases, self.layout), []
        elif not self._open_packed():
            return
        self._seen = [_signature(base, self.kind) for base in self.bases]

    def _open_packed(self) -> bool:
        """Takes the packed weights as they are now; says why where float8 cannot be had."""
        self.source = packed_source(self.bases, self.kind)
        self.home, self._versions = None, []
        self.fp8 = asks_fp8(self.bases[0])
        if self.fp8:
            try:
                self.home = PackedFp8Home(self.source, self.layout)
            except ValueError as error:
                self.way, self.reason = "plain", str(error)
                return False
        return True

    def _bind(self, states: list[LoraState]) -> None:
        """Takes the active adapter's tensors; another one has its own ranks and scales."""
        downs = [state.down for state in states if state.down is not None]
        ups = [state.up for state in states if state.up is not None]
        scales = tuple(state.scale for state in states)
        new, old = (*downs, *ups), (*self.downs, *self.ups)
        same = scales == self.layout.scales and len(new) == len(old)
        if same and all(a is b for a, b in zip(new, old, strict=True)):
            return
        self.downs, self.ups = list(downs), list(ups)
        ranks = tuple(down.shape[0] for down in downs)
        layout = Layout(self.base_layout.width, self.base_layout.outs, ranks, scales)
        if layout.ranks != self.layout.ranks:
            if isinstance(self.home, PackedFp8Home):
                self.home = self.home.of_ranks(layout)
            elif self.wide is not None or self.home is not None:
                self.release()
        self.layout = layout
        self._versions = []

    @torch.no_grad()
    def _adopt(self) -> None:
        """Moves the bases' weights into M."""
        layout, first = self.layout, self.bases[0].weight
        with torch.inference_mode(False):
            n, i, k = layout.rows, layout.width, layout.columns
            wide = torch.zeros(n + k, i + k, dtype=first.dtype, device=first.device)
            for base, rows in zip(self.bases, layout.out_slices(), strict=True):
                view = wide[rows, :i]
                view.copy_(rows_of(base))
                put_rows(base, view)
            # A rewritten adapter must not look like a rewritten base to a waiting backward.
            self._rows = wide.data[:n, :i]
        self.wide, self._versions = wide, []
        self._places = [base.weight.data_ptr() for base in self.bases]

    def _refresh(self) -> None:
        """Writes A and s*B into M where they may have changed.

        A changed version or address tells of optimiser steps, loads and in-place edits. Some
        optimisers write through `.data` or a pointer, which leaves no trace: so M is written in
        each forward that needs a gradient and in the first one after it. Where nothing was seen
        to change, M's version stays, so that a graph made before may still run its backward.
        """
        versions = [(_version(tensor), tensor.data_ptr()) for tensor in (*self.downs, *self.ups)]
        changed = versions != self._versions
        grad = torch.is_grad_enabled()
        if self.home is not None:
            if changed or grad or self._unsure:
                self.home.write(self.layout, self.downs, self.ups, changed)
            self._versions, self._unsure = versions, grad
            return
        assert self.wide is not None
        if changed:
            write_adapters(self.wide, self.layout, self.downs, self.ups)
        elif grad or self._unsure:
            with _unsafe_preserve_version_counter(self.wide):
                write_adapters(self.wide, self.layout, self.downs, self.ups)
        self._versions, self._unsure = versions, grad


def _signature(base: Any, kind: Kind) -> tuple[Any, ...]:
    """What tells that a base was moved, replaced, trained or given another forward."""
    weight, bias = base.weight, base.bias
    # FSDP2 frees a storage and fills it again for each call: then its address is another, but a
    # view of it, which is what a source holds, sees the new bytes.
    packed = kind in ("4bit", "int8")
    place = weight.untyped_storage()._cdata if packed else weight.data_ptr()
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return (
        base, id(weight), place, weight.device, weight.dtype, trained,
        "forward" in base.__dict__, _marked(base, kind),
    )  # fmt: skip


def _marked(base: Any, kind: Kind) -> tuple[int, ...]:
    """What tells that float8 weights, or the powers of two of packed ones, are others now."""
    if kind == "fp8":  # loaded weights must be brought together anew
        parts = (base.weight, base.scale, base.turned, base.turned_scale)
        return tuple(number for part in parts for number in (id(part), _version(part)))
    if not asks_fp8(base):
        return ()
    scale = getattr(base, "scale", base.weight)  # int8 rows'; others come with their weight
    return _version(base.weight), id(scale), _version(scale)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
