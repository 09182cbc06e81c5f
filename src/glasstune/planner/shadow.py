"""A model of the very classes that will be trained, made of tensors without data.

Its layers are those of a real load: transformers' modules, bitsandbytes' packed layers, PEFT's
adapters, the groups of the fast path. Only the numbers are missing, so a step of it allocates,
saves and frees what a step of the real model does, and nothing has to be known of an architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from glasstune.adapters.inject import add_adapter, keep_activation_dtype
from glasstune.adapters.lora_layers import (
    LoraState,
    Way,
    adapted_modules,
    lora_state,
    why_no_linear_lora,
)
from glasstune.fast.bases import asks_fp8, packed_source
from glasstune.fast.blocks import find_blocks, find_norms
from glasstune.fast.group import Group
from glasstune.fast.groups import shared_inputs
from glasstune.fast.members import attach
from glasstune.kernels.lora_group import MAX_MEMBERS
from glasstune.models.families import documents
from glasstune.models.families.table import family_of
from glasstune.models.inspect.dry_run import skeleton
from glasstune.models.inspect.source import ModelSource
from glasstune.models.packed import is_four_bit
from glasstune.planner.attention import replace_attention
from glasstune.planner.fp8 import PlannedHome, give_fp8, is_fp8

_BLOCK = 64
_NESTED = 256


class PlannedGroup(Group):
    """A group of the fast path on tensors without data: nothing of it is looked at or moved.

    Attributes:
        stays: What it keeps for float8 products; None without.
    """

    stays: PlannedHome | None = None

    def plan(self) -> None:
        """Binds the group as its first `look` would."""
        states = [lora_state(layer, True) for layer in self.layers]
        self.way = self._way(states)
        if self.way == "plain":
            return
        if self.way == "wide":
            self._bind(states)
        if self.kind != "full":
            self.source = None if self.kind == "fp8" else packed_source(self.bases, self.kind)
            if self.fp8:
                device = self.bases[0].weight.device
                self.stays = PlannedHome.of(self.layout, self.source, device)
                self.home = self.stays  # type: ignore[assignment]
        else:
            layout, weight = self.layout, self.bases[0].weight
            size = (layout.rows + layout.columns, layout.width + layout.columns)
            self.wide = torch.empty(size, dtype=weight.dtype, device=weight.device)
            self._rows = self.wide[: layout.rows, : layout.width]

    def look(self, in_training: bool = False) -> None:
        """Sees whether adapters are switched off; all else is as `plan` left it."""
        self.way = self._way([lora_state(layer, True) for layer in self.layers])

    def _way(self, states: Sequence[LoraState]) -> Way:
        ways = {state.way for state in states}
        alone = len(self.layers) == 1 and not (self.fp8 and self.kind != "fp8")
        if "plain" in ways or (ways == {"grouped"} and alone):
            return "plain"
        return "grouped" if "grouped" in ways else "wide"


@dataclass
class Shadow:
    """A model without data.

    Args:
        mode: The mode under which its tensors live.
        model: The PEFT model, or the bare one where nothing is adapted.
        blocks: Paths of the blocks that were kept, in order.
        stands_for: For each block of the real model, the index in `blocks` of the one that is
            like it.
        groups: Groups of the fast path; empty without it.
        norms: Paths of normalisations that are compiled beside the blocks.
        device: Where its tensors pretend to be: `cpu`, so that a plan needs no GPU.
        target: `cpu` or `cuda`: where the run will be.
        autocast: Type of the products, or None.
    """

    mode: FakeTensorMode
    model: Any
    blocks: list[str]
    stands_for: list[int]
    groups: list[PlannedGroup] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    device: str = "cpu"
    target: str = "cpu"
    autocast: torch.dtype | None = torch.bfloat16

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The autocast of a training forward."""
        if self.autocast is None:
            yield
            return
        with torch.autocast(self.device, self.autocast):
            yield


def make_shadow(
    source: ModelSource,
    bits: int,
    adapter: Mapping[str, Any],
    *,
    quantization: Mapping[str, Any] = {},
    dtype: str = "bfloat16",
    int8_compute: str = "w8a16",
    target: str = "cpu",
    fast: bool = False,
    attention: str | None = None,
    packed: bool = False,
    fp8: bool = False,
    fp8_keep: Sequence[str] = (),
) -> Shadow:
    """Builds the adapted model without data.

    Args:
        source: What `open_source` found.
        bits: 16, 8 or 4.
        adapter: Options of the adapter.
        quantization: Options of `BitsAndBytesConfig`.
        dtype: Load dtype.
        int8_compute: `w8a16` or `llm_int8`.
        target: `cpu` or `cuda`: where the run will be.
        fast: Whether layers of one input share a product, as `speed_up` makes them.
        attention: `attn_implementation`, None for the model's own.
        packed: Whether rows hold several documents, kept apart as `install_packing` does it.
        fp8: Whether products are float8.
        fp8_keep: Patterns of layers that stay as they are then.

    Raises:
        InputError: As `skeleton` and `add_adapter`.
    """
    base: Any = skeleton(source, bits, quantization, dtype=dtype, int8_compute=int8_compute)
    if fp8:
        give_fp8(base, quantization.get("llm_int8_skip_modules"), fp8_keep)
    return shadow_of(base, adapter, target=target, fast=fast, attention=attention, packed=packed)


def shadow_of(
    base: Any,
    adapter: Mapping[str, Any],
    *,
    target: str = "cpu",
    fast: bool = False,
    attention: str | None = None,
    packed: bool = False,
) -> Shadow:
    """Makes a shadow of a model on the meta device; the model is used up.

    Args:
        base: A frozen transformers model; packed weights have their logical shapes.
        adapter: As in `make_shadow`.
        target: Likewise.
        fast: Likewise.
        attention: Likewise.
        packed: Likewise.
    """
    if attention is not None:
        base.set_attn_implementation(attention)
    if packed and packing_of(base, target, fast) == "documents":
        documents.register()
        base.set_attn_implementation(documents.NAME)
    base.config.use_cache = False
    if target == "cuda" and fast:
        replace_attention(base)
    stands_for = _thin_out(base)
    device = "cpu"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model = add_adapter(base, **dict(adapter)).train()
    with mode:
        _lose_data(model, device)
        half = base.dtype in (torch.bfloat16, torch.float16)
        if half:
            keep_activation_dtype(model)
        adapted = adapted_modules(model)
        blocks = find_blocks(model, adapted)
        made = Shadow(
            mode, model, list(blocks), stands_for or list(range(len(blocks))),
            norms=list(find_norms(model, blocks)),
            device=device, target=target, autocast=torch.bfloat16 if half else None,
        )  # fmt: skip
        if fast:
            made.groups = _groups(made, adapted)
    return made


def packing_of(base: Any, target: str, fast: bool) -> str:
    """Returns how documents of a row are kept apart: `documents`, `mask` or `kernel`.

    `kernel`: by an attention kernel that needs no mask and keeps what a plain one keeps.

    Args:
        base: The model.
        target: `cpu` or `cuda`.
        fast: Whether layers share products: on a CPU that is so where they are compiled, and then
            no call may differ by the bounds of the documents.
    """
    family = family_of(base.config)
    plain = base.config._attn_implementation in ("sdpa", documents.NAME)
    if family is not None and family.packing == "documents" and plain:
        if target != "cpu":
            return "kernel"
        return "mask" if fast else "documents"
    return "mask"


def _thin_out(base: nn.Module) -> list[int]:
    """Leaves of the blocks one of each kind, and of a kind that comes first or often two.

    Returns:
        For each block that was there, which of those left stands for it.
    """
    lists = [
        module
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and "." in path
    ]
    blocks = max(lists, key=lambda part: sum(p.numel() for p in part.parameters()), default=None)
    if blocks is None or len({type(block) for block in blocks}) != 1:
        return []
    kinds = [_kind(block) for block in blocks]
    left: list[int] = []
    for index, kind in enumerate(kinds):
        # The first block is unlike its likes (its input needs no gradient), so it stands alone.
        if sum(kinds[other] == kind for other in left if other) < 1 or index == 0:
            left.append(index)
    place = {kinds[index]: number for number, index in enumerate(left) if index}
    stands_for = [0, *(place[kind] for kind in kinds[1:])]
    kept = [blocks[index] for index in left]
    blocks._modules.clear()
    for number, block in enumerate(kept):
        blocks.add_module(str(number), block)
    return stands_for


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What tells one block's memory from another's: classes, shapes, types, kind of attention."""
    shapes = [
        (name, tuple(p.shape), str(p.dtype), type(block.get_submodule(name.rpartition(".")[0])))
        for name, p in block.named_parameters()
    ]
    inner = [
        (name, value)
        for part in block.modules()
        for name, value in vars(part).items()
        if name in ("attention_type", "layer_type", "sliding_window", "is_sliding")
    ]
    return tuple(shapes), tuple(map(str, inner))


def _lose_data(base: nn.Module, device: str) -> None:
    made: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh
        return made[id(tensor)]

    for module in base.modules():
        if is_four_bit(module) and not hasattr(module, "base_layer"):
            _pack_four_bit(module, device)
            bias = module._parameters.get("bias")
            if bias is not None:
                module._parameters["bias"] = empty(bias)  # type: ignore[assignment]
            continue
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = empty(value)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = empty(buffer)


def _pack_four_bit(layer: Any, device: str) -> None:
    """Gives a `Linear4bit` a packed weight and its state, of the right sizes."""
    old = layer.weight
    count = layer.in_features * layer.out_features
    block = int(getattr(old, "blocksize", None) or _BLOCK)
    nested = bool(getattr(old, "compress_statistics", True))
    blocks = -(-count // block)

    def floats(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device)

    compute = layer.compute_dtype or torch.bfloat16
    state = SimpleNamespace(
        absmax=torch.empty(blocks, dtype=torch.uint8, device=device) if nested else floats(blocks),
        shape=torch.Size((layer.out_features, layer.in_features)), dtype=compute, blocksize=block,
        quant_type=getattr(old, "quant_type", "nf4"), nested=nested, code=floats(16),
        offset=torch.empty((), device=device) if nested else None,
        state2=SimpleNamespace(
            absmax=floats(-(-blocks // _NESTED)), code=floats(256), blocksize=_NESTED,
            dtype=torch.float32, nested=False,
        ) if nested else None,
    )  # fmt: skip
    raw = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device=device)
    weight: Any = nn.Parameter(raw, requires_grad=False)
    weight.quant_state, weight.bnb_quantized = state, True
    layer._parameters["weight"] = weight
    layer.support_avx512bf16_for_cpu = False


def _groups(shadow: Shadow, adapted: Mapping[str, nn.Module]) -> list[PlannedGroup]:
    """Groups adapted layers as `fast.groups.make_groups` does, on tensors without data."""
    layers: dict[str, Any] = {}
    keys: dict[str, tuple[Any, ...]] = {}
    shared = _shared(shadow.model)
    for path, layer in adapted.items():
        if why_no_linear_lora(layer) is None:
            base: Any = layer.get_base_layer()  # type: ignore[operator]
            if id(base.weight) not in shared:
                layers[path], keys[path] = layer, _key(base)
    groups = []
    for paths in shared_inputs(_calls(shadow, layers), list(layers)):
        by_key: dict[tuple[Any, ...], list[str]] = {}
        for path in paths:
            by_key.setdefault(keys[path], []).append(path)
        for key, members in by_key.items():
            for start in range(0, len(members), MAX_MEMBERS):
                part = members[start : start + MAX_MEMBERS]
                groups.append(PlannedGroup(part, [layers[path] for path in part], key[0]))
    attach(groups)
    for group in groups:
        group.plan()
    return groups


def _key(base: Any) -> tuple[Any, ...]:
    if is_four_bit(base):
        return ("4bit", base.in_features, base.weight.quant_state.nested, asks_fp8(base))
    if type(base).__name__ == "Int8Linear":
        return ("int8", base.in_features, asks_fp8(base))
    if is_fp8(base):
        return ("fp8", base.in_features)
    weight = base.weight
    conv = type(base).__name__ == "Conv1D"
    return ("full", weight.shape[0] if conv else weight.shape[1], weight.dtype)


def _shared(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _calls(shadow: Shadow, layers: Mapping[str, nn.Module]) -> list[tuple[str, Tensor | None]]:
    seen: list[tuple[str, Tensor | None]] = []

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append((path, args[0] if len(args) == 1 and isinstance(args[0], Tensor) else None))

        return hook

    handles = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    try:
        with torch.no_grad(), shadow.precision():
            ids = torch.zeros(1, 8, dtype=torch.int64, device=shadow.device)
            shadow.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen
