"""Compiled blocks: the walk by hand, and what a compiled block really saves."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from allocating import allocated
from families import family_config
from runs import missing
from tiny import tiny_config
from torch import Tensor, fx

from glasstune.adapters.inject import add_adapter, keep_activation_dtype
from glasstune.fast.members import detach
from glasstune.fast.speed_up import speed_up
from glasstune.models.families.table import FAMILIES
from glasstune.models.inspect.source import open_source
from glasstune.planner.graphs import compiled_bytes
from glasstune.planner.losses import frozen_head_loss
from glasstune.planner.model import MemoryModel, Setup
from glasstune.planner.shadow import make_shadow
from glasstune.planner.trace import Batch, block_calls, trace_step
from glasstune.planner.walk import walk

ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def graph(function: Any, *inputs: Tensor) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    made: fx.GraphModule = make_fx(function, tracing_mode="fake")(*inputs)
    return made


def test_what_is_fused_writes_nothing() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        wide = torch.relu(torch.mm(x, w).double()) * 2 + 1
        return torch.mm(wide.float(), w)

    found = walk(graph(function, torch.ones(32, 16), torch.ones(16, 16)), set(), 1)
    one = 32 * 16 * 4
    # The first product's result is overwritten by the fused chain, then the second is made.
    assert found.peak == 2 * one
    assert found.out == one


def test_a_buffer_is_free_after_its_last_reader() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        first = torch.mm(x, w)
        second = torch.mm(first, w)
        third = torch.mm(second, w)
        return third + first

    one = 32 * 16 * 4
    assert walk(graph(function, torch.ones(32, 16), torch.ones(16, 16)), set(), 1).peak == 3 * one


def gated(gate: Tensor, up: Tensor, grad: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """The backward of a gated product that makes its own input again."""
    half = torch.sigmoid(gate)
    inner = gate * half * up
    weight_grad = torch.mm(grad.t(), inner)
    inner_grad = torch.mm(grad, down)
    up_grad = inner_grad * gate * half
    gate_grad = inner_grad * up * half * (1 + gate * (1 - half))
    return weight_grad, torch.mm(up_grad, down.t()), torch.mm(gate_grad, down.t())


def gated_inputs() -> tuple[Tensor, ...]:
    tokens, inner, hidden = 256, 96, 16
    return (
        torch.randn(tokens, inner), torch.randn(tokens, inner), torch.randn(tokens, hidden),
        torch.randn(hidden, inner),
    )  # fmt: skip


def test_what_reads_the_same_is_one_kernel_with_all_its_results() -> None:
    """`inner` is not made and freed before: its kernel is that of the two gradients."""
    inputs = gated_inputs()
    one, small = 256 * 96 * 4, 256 * 16 * 4
    found = walk(graph(gated, *inputs), set(), 1, takes=True)
    # gate, up, the incoming gradient and the weight; the gradient of `inner`; three results.
    assert found.peak == 6 * one + small + 16 * 96 * 4


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_that_is_what_inductors_own_code_allocates() -> None:
    if shutil.which("g++") is None:
        missing("g++")
    inputs = gated_inputs()
    compiled = torch.compile(gated, dynamic=False)
    compiled(*inputs)
    results = []
    real = allocated(lambda: results.append(compiled(*inputs)))
    assert walk(graph(gated, *inputs), set(), 64).peak == real
    torch._dynamo.reset()


def test_a_result_takes_an_inputs_place_only_where_nothing_else_reads_it() -> None:
    def function(x: Tensor, w: Tensor, twice: bool) -> tuple[Tensor, ...]:
        first = torch.mm(x, w)
        results = (first * 2, first + 1) if twice else (first * 2,)
        return tuple(torch.mm(result, w) for result in results)

    inputs, one = (torch.ones(32, 16), torch.ones(16, 16)), 32 * 16 * 4
    alone = graph(lambda x, w: function(x, w, False), *inputs)
    both = graph(lambda x, w: function(x, w, True), *inputs)
    assert walk(alone, set(), 1).peak == 2 * one  # the first product's place, and the second one
    assert walk(both, set(), 1).peak == 3 * one  # beside it: two results


def test_a_product_lives_in_the_joined_tensor_that_it_is_a_part_of() -> None:
    def function(x: Tensor, a: Tensor, w: Tensor, later: Tensor) -> tuple[Tensor, ...]:
        low = torch.mm(x, a)
        out = torch.mm(torch.cat([x, low], 1), w)
        out = torch.mm(torch.mm(out, later), later)
        return out, torch.mm(low.t(), x)

    x, a, w = torch.ones(32, 16), torch.ones(16, 4), torch.ones(20, 64)
    found = walk(graph(function, x, a, w, torch.ones(64, 64)), set(), 1)
    # While the last but one product is made: the joined tensor, for its part; two of 64 columns.
    assert found.peak == 32 * (20 + 64 + 64) * 4


def test_what_stays_is_not_freed_after_its_last_use() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.mm(torch.mm(torch.mm(x, w), w), w)

    made = graph(function, torch.ones(32, 16), torch.ones(16, 16))
    one, weight = 32 * 16 * 4, 16 * 16 * 4
    assert walk(made, set(), 1, takes=True).peak == 2 * one + weight
    assert walk(made, set(), 1, takes=True, stays=["x_1"]).peak == 3 * one + weight


def really_saved(fast: bool, budget: float | None = None) -> int:
    """Bytes that a real compiled block saves for its backward, its output in, its input out."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    base.requires_grad_(False)
    model = add_adapter(base, **ADAPTER).train()
    keep_activation_dtype(model)
    options = {"backend": "aot_eager_decomp_partition", "dynamic": False}
    report = speed_up(model, compile=True, compile_options=options, memory_budget=budget)
    if not fast:
        detach(report.groups, [])
        for path in report.record.compiled:
            model.get_submodule(path)._compiled_call_impl.groups = []
    x = torch.randn(2, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    places = torch.arange(64).expand(2, -1).contiguous()
    angles = model.get_base_model().model.rotary_emb(x, places)
    wide = [group.wide for group in report.groups if group.wide is not None]
    outside = (*model.parameters(), *model.buffers(), *angles, *wide, x)
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


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("fast", [False, True], ids=["compiled", "wide"])
def test_kept_bytes_are_those_that_a_real_compiled_block_saves(fast: bool) -> None:
    shadow = make_shadow(open_source(tiny_config()), 16, ADAPTER, target="cuda", fast=fast)
    call = block_calls(shadow, Batch(2, 64))[1]
    plain, again = compiled_bytes(shadow, shadow.blocks[1], call, round_to=1)
    assert plain.kept == really_saved(fast)
    assert again.kept == 2 * 64 * 64 * 2  # its output
    assert plain.backward >= plain.kept


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", [0.9, 0.7, 0.3])
def test_kept_bytes_under_a_budget_are_those_that_a_real_block_saves(budget: float) -> None:
    shadow = make_shadow(open_source(tiny_config()), 16, ADAPTER, target="cuda", fast=True)
    call = block_calls(shadow, Batch(2, 64))[1]
    whole, _ = compiled_bytes(shadow, shadow.blocks[1], call, round_to=1)
    light, again = compiled_bytes(shadow, shadow.blocks[1], call, round_to=1, budget=budget)
    assert light.kept == really_saved(True, budget) < whole.kept
    assert light.flops >= whole.flops
    assert again.kept == 2 * 64 * 64 * 2


@pytest.mark.slow(reason="the compiler takes 15 s")
def test_operations_of_the_graphs_are_those_of_the_layer_and_budgets_add_to_them() -> None:
    setup = Setup(open_source(tiny_config()), 16, ADAPTER, target="cuda", fast=True, compiled=True)
    model = MemoryModel(setup)
    batch = Batch(2, 64)
    before = model.activations(batch)
    assert before.light == {}
    found = model.lighter(batch)
    assert found is model.lighter(batch)
    last = {1.0: before.plain[-1]} | {b: blocks[0][-1] for b, blocks in found.light.items()}
    kept, flops = [b.kept for b in last.values()], [b.flops for b in last.values()]
    assert len(last) >= 3
    assert kept == sorted(kept, reverse=True)
    assert flops == sorted(flops)
    for block in last.values():
        assert block.again == kept[0] - block.kept
    # Scaled to half the rows, every block halves.
    half = model.scaled(Batch(1, 64), batch)
    assert set(half.light) == set(found.light)
    assert half.light[0.9][0][-1].kept == last[0.9].kept // 2


SLOW = pytest.mark.slow(reason="the compiler takes 5 to 10 s a family")


@pytest.mark.parametrize(
    "family",
    [
        "bloom",
        "gemma2",
        *[pytest.param(x, marks=SLOW) for x in ("baichuan", "gpt2", "phi3", "qwen3")],
    ],
)
def test_compiled_families_keep_less_than_traced_ones(family: str) -> None:
    batch = Batch(2, 64, 50)

    def kept(compiled: bool) -> int:
        setup = Setup(
            open_source(family_config(family)), 16, ADAPTER, target="cuda", fast=True,
            compiled=compiled, attention=FAMILIES[family].attention,
        )  # fmt: skip
        return MemoryModel(setup).activations(batch).plain[-1].kept

    assert 0.3 * kept(False) < kept(True) <= 1.05 * kept(False)


def test_blooms_scores_are_not_planned_where_a_kernel_makes_them() -> None:
    """On a GPU `flex_attention` keeps q, k, v, its result and a number a row and head."""
    found = {}
    for fast in (False, True):
        shadow = make_shadow(
            open_source(family_config("bloom")), 16, ADAPTER, target="cuda", fast=fast
        )
        steps = [trace_step(shadow, Batch(1, n), frozen_head_loss) for n in (64, 512)]
        found[fast] = [step.blocks[-1].kept for step in steps]
    assert found[True][1] < 8.2 * found[True][0]
    assert found[False][1] > 12 * found[False][0]  # each head's scores


def test_a_block_that_is_no_one_graph_is_traced_and_said() -> None:
    setup = Setup(
        open_source(family_config("mixtral")), 16, ADAPTER, target="cuda", fast=True, compiled=True
    )
    found = MemoryModel(setup).activations(Batch(2, 64, 50))
    assert found.plain[-1].kept > 0
    assert any("no one graph" in note for note in found.notes)
