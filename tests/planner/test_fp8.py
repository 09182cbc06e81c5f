"""Float8 products in the plan, against real converted layers, what they save and allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocating import allocated
from tiny import tiny_config
from torch import Tensor

from glasstune.adapters.inject import add_adapter, keep_activation_dtype
from glasstune.fast.speed_up import speed_up
from glasstune.kernels.fp8 import Fp8Linear
from glasstune.kernels.fp8.product import fp8_product, fp8_rows
from glasstune.models.fp8 import convert_to_fp8
from glasstune.models.inspect.source import open_source
from glasstune.planner.fp8 import MAKING, emulated_bytes, float8_flops
from glasstune.planner.graphs import compiled_bytes
from glasstune.planner.losses import frozen_head_loss
from glasstune.planner.model import MemoryModel, Setup
from glasstune.planner.seconds import SHARE, forward_seconds
from glasstune.planner.shadow import make_shadow
from glasstune.planner.trace import Batch, block_calls, trace_step

ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
KEEP = ("*.1.mlp.down_proj",)


def real_model(keep: tuple[str, ...] = ()) -> Any:
    """A converted tiny model with adapters."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=3), dtype=torch.bfloat16)
    base.requires_grad_(False)
    convert_to_fp8(base, None, keep)
    model = add_adapter(base, **ADAPTER).train()
    keep_activation_dtype(model)
    return model


def setup(fast: bool = True, **options: Any) -> Setup:
    source = open_source(tiny_config(num_hidden_layers=3))
    return Setup(source, 16, ADAPTER, target="cuda", fast=fast, fp8=True, **options)


def frozen_bytes(model: Any) -> int:
    """Bytes of all distinct storages that are not trained, rotary tables left out."""
    found: dict[int, int] = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.requires_grad and "inv_freq" not in name:
            storage = value.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("keep", [(), KEEP], ids=["all", "some kept"])
def test_a_float8_base_is_as_large_as_a_real_one(keep: tuple[str, ...]) -> None:
    model = real_model(keep)
    planned = MemoryModel(setup(fp8_keep=keep)).static
    rotary = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
    assert planned.base == frozen_bytes(model) + rotary
    report = speed_up(model, compile=False)
    homes = [group.home for group in report.groups if group.home is not None]
    low = sum(part.nbytes for home in homes for part in home.low.tensors())
    joined = sum(home.weights.scale.nbytes for home in homes)
    full = sum(group.wide.nbytes for group in report.groups if group.wide is not None)
    kept = {
        group.wide.untyped_storage()._cdata for group in report.groups if group.wide is not None
    }
    frozen = frozen_bytes(model)
    assert len(homes) == (12 if not keep else 11)
    assert bool(kept) == bool(full) == bool(keep)
    # A home's own copy of its columns' scales, 4 bytes a column, is not counted.
    assert planned.base + planned.wide == frozen + rotary + low
    assert joined < 0.02 * frozen
    report.undo()


def test_packed_layers_keep_their_bytes_and_what_float8_needs_beside_them() -> None:
    source = open_source(tiny_config(num_hidden_layers=3))
    plain, fp8 = (
        MemoryModel(Setup(source, 4, ADAPTER, target="cuda", fast=True, fp8=fp8))
        for fp8 in (False, True)
    )
    assert fp8.static.base == plain.static.base
    # q+k+v, o, gate+up, down: (outputs, inputs, ranks); e = 128 columns, as 3 * 24 is below.
    groups = [(128, 64, 24), (64, 64, 8), (256, 64, 16), (64, 128, 8)]
    beside = sum(128 * (n + i) + 4 * (n + i) + 2 * k * (n + i) + 4 * 4 * k for n, i, k in groups)
    assert fp8.static.wide == 3 * beside
    # gate+up by rows: 256 x (64 + 128) bytes, and nothing of it stays.
    assert fp8.largest_expansion() == 256 * (64 + 128)


def test_making_a_weight_takes_ten_bytes_an_entry() -> None:
    weight = torch.randn(256, 512, dtype=torch.bfloat16)
    made: list[Fp8Linear] = []
    real = allocated(lambda: made.append(Fp8Linear.from_weight(weight)))
    assert MAKING * weight.numel() == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("size", [(64, 128, 256), (256, 512, 64)])
def test_emulated_products_allocate_what_is_planned(size: tuple[int, int, int]) -> None:
    tokens, width, outs = size
    x = torch.randn(tokens, width, dtype=torch.bfloat16)
    rows, scale = fp8_rows([x], None, None, None, 0)
    weight, units = fp8_rows([torch.randn(outs, width)], None, None, None, 0)
    given = (rows, scale, weight, units[:, 0], torch.bfloat16)
    found: list[Any] = []
    real = allocated(lambda: found.append(fp8_product(*given)))
    planned = emulated_bytes("glasstune.fp8_product.default", given)
    assert planned <= real <= planned + 1.1 * 2 * tokens * outs
    real = allocated(lambda: found.append(fp8_rows([x], None, None, None, 0)))
    planned = emulated_bytes("glasstune.fp8_rows.default", ([x],))
    assert planned == pytest.approx(real, rel=0.05)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_kept_bytes_are_those_that_a_real_compiled_float8_block_saves() -> None:
    shadow = make_shadow(
        open_source(tiny_config(num_hidden_layers=3)), 16, ADAPTER, target="cuda", fast=True,
        fp8=True,
    )  # fmt: skip
    call = block_calls(shadow, Batch(2, 64))[1]
    plain, again = compiled_bytes(shadow, shadow.blocks[1], call, round_to=1)
    assert plain.kept == really_saved()
    assert again.kept == 2 * 64 * 64 * 2


def really_saved() -> int:
    """Bytes that a real compiled float8 block saves, its output in, its input out."""
    model = real_model()
    options = {"backend": "aot_eager_decomp_partition", "dynamic": False}
    # The budget is torch's own, of the whole process: another test may have left one.
    report = speed_up(model, compile=True, compile_options=options, memory_budget=1.0)
    x = torch.randn(2, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    places = torch.arange(64).expand(2, -1).contiguous()
    angles = model.get_base_model().model.rotary_emb(x, places)
    homes = [group.home for group in report.groups if group.home is not None]
    stays = [
        tensor
        for home in homes
        for tensor in (
            home.weights.wide, home.weights.scale, home.weights.turned, home.weights.turned_scale,
            *home.low.tensors(),
        )
    ]  # fmt: skip
    outside = (*model.parameters(), *model.buffers(), *angles, *stays, x)
    held = {tensor.untyped_storage()._cdata for tensor in outside}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            saved[storage._cdata] = storage
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
    ):
        y = model.get_base_model().model.layers[1](
            x, position_embeddings=angles, attention_mask=None, position_ids=places
        )
    saved[y.untyped_storage()._cdata] = y.untyped_storage()
    report.undo()
    torch._dynamo.reset()
    return sum(storage.nbytes() for storage in saved.values())


def test_weights_that_are_kept_are_no_activations() -> None:
    """Each of two wide members takes its own rows of both copies."""
    config = tiny_config(num_hidden_layers=2, intermediate_size=1024)
    shadow = make_shadow(open_source(config), 16, ADAPTER, target="cuda", fast=True, fp8=True)
    assert any(group.layout.apart for group in shadow.groups)
    found = trace_step(shadow, Batch(1, 8), frozen_head_loss)
    joined = 2 * 1024 * (64 + 128)
    assert max(block.forward for block in found.blocks) < joined
    assert max(block.backward for block in found.blocks) < 2 * joined


def test_operations_are_counted_as_by_hand() -> None:
    model = MemoryModel(setup())
    tokens = 100
    # (outputs, inputs) of the four products of each of three layers, with 128 columns beside.
    sizes = [(128, 64), (64, 64), (256, 64), (64, 128)]
    forward = 3 * sum(n * (i + 128) for n, i in sizes)
    backward = 3 * sum(i * (n + 128) for n, i in sizes)
    found = [float8_flops(model.shadow.groups, model.times, tokens, f) for f in (1, 2)]
    assert found == [tokens * (forward + backward), tokens * (2 * forward + backward)]


def test_what_a_step_does_beside_its_products_is_not_halved() -> None:
    share = SHARE["cuda", True]
    once = 1 + 256 / 8192
    plain = forward_seconds(1000, 8192, 10.0, "cuda", True)
    # 800 of the 1,000 become float8: counted as 400.
    float8 = forward_seconds(600, 8192, 10.0, "cuda", True, float8=400)
    assert plain == pytest.approx(once * 100 / share)
    assert plain - float8 == pytest.approx(once * 40)
    # Emulated, they take as long as any other.
    emulated = forward_seconds(600, 8192, 10.0, "cpu", True, float8=400)
    assert emulated == pytest.approx(forward_seconds(1000, 8192, 10.0, "cpu", True))
