"""Blocks under torch.compile: one graph for all, the same numbers, nothing expanded is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER
from speeding import IDS, distance, furthest, gradients, tiny
from torch._dynamo.testing import CompileCounterWithBackend

from glasstune.adapters.base import base_only
from glasstune.adapters.inject import keep_activation_dtype
from glasstune.core.choices import Choices
from glasstune.core.errors import InputError
from glasstune.fast import compile as compiling
from glasstune.fast.blocks import find_blocks, find_norms
from glasstune.fast.compile import Entry, decide
from glasstune.fast.speed_up import plain, speed_up

pytestmark = QUIET_COMPILER
SLOW = pytest.mark.slow(reason="the compiler takes 2 to 5 s a case")


def one_fast(*cases: Any) -> list[Any]:
    """Returns cases of which only the first runs in the fast suite."""
    return [cases[0], *(pytest.param(case, marks=SLOW) for case in cases[1:])]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, backend: Any = "aot_eager", **options: Any) -> Any:
    return speed_up(
        model, compile=True,
        compile_options={"backend": backend, "dynamic": False, "fullgraph": True}, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "family", one_fast("llama", "bloom", "gpt2", "qwen2", "gemma3_text", "phi3")
)
def test_the_same_gradients(family) -> None:
    model = tiny(family)
    right = gradients(model)
    report = compiled(model)
    assert furthest(gradients(model), right) < 1e-5
    assert len(report.record.compiled) >= 2
    report.undo()
    assert furthest(gradients(model), right) == 0
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize("bits", one_fast(4, 8, 32))
def test_layers_share_their_graphs(bits) -> None:
    """Two frames for four layers: the first, whose input needs no gradient, and the others."""
    model = four_layers(bits)
    right = gradients(model)
    counter = CompileCounterWithBackend("aot_eager")
    report = compiled(model, counter)
    assert furthest(gradients(model), right) < 2e-5
    gradients(model)
    norms = sum("norm" in path for path in report.record.compiled)
    assert counter.frame_count == 2 + norms
    assert len(report.record.compiled) == 4 + norms


def four_layers(bits: int) -> Any:
    from families import family_model
    from speeding import adapted, quantize, wide_enough

    base = family_model("llama", **{**wide_enough("llama"), "num_hidden_layers": 4})
    quantize(base, bits)
    return adapted(base)


@pytest.mark.parametrize("bits", one_fast(4, 8))
@pytest.mark.parametrize("budget", one_fast(None, 0.3))
def test_no_expanded_weight_is_kept(bits, budget) -> None:
    model = four_layers(bits)
    right = gradients(model)
    report = compiled(model, memory_budget=budget)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    # A kept weight may be saved as a view of another shape: its memory tells.
    sizes = {tensor.untyped_storage().nbytes() for tensor in kept}
    wides = {
        4 * (group.layout.rows + group.layout.columns) * (group.layout.width + group.layout.columns)
        for group in report.groups
    }
    assert len(kept) > 10
    assert not sizes & wides
    loss.backward()
    assert furthest(gradients(model), right) < 2e-5
    report.undo()


def test_an_optimiser_step_is_seen() -> None:
    model, other = tiny("llama"), tiny("llama")
    compiled(model)
    curves = []
    for one in (model, other):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.01)
        curve = []
        for _ in range(4):
            loss = one(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][0] - curves[0][-1] > 0.05


@pytest.mark.parametrize("bits", one_fast(4, 16, 8))
def test_bf16_under_autocast(bits) -> None:
    model = tiny("llama", bits, torch.bfloat16)
    keep_activation_dtype(model)
    right = gradients(model, autocast=True)
    compiled(model)
    assert distance(gradients(model, autocast=True), right) < 0.1


def test_switches_between_calls() -> None:
    model = tiny("llama", lora_dropout=0.2)
    report = compiled(model)
    right = {}
    with plain(model):
        right["eval"] = gradients(model)
        with base_only(model), torch.no_grad():
            right["base"] = model(input_ids=IDS, use_cache=False).logits
    assert furthest(gradients(model), right["eval"]) < 1e-5
    with base_only(model), torch.no_grad():
        got = model(input_ids=IDS, use_cache=False).logits
    assert (got - right["base"]).abs().max() < 1e-4
    model.train()
    torch.manual_seed(3)
    dropped = gradients(model)
    assert {group.way for group in report.groups} == {"grouped", "plain"}
    model.eval()
    assert furthest(gradients(model), right["eval"]) < 1e-5
    assert furthest(dropped, right["eval"]) > 0.1
    model.merge_adapter()
    with torch.no_grad():
        merged = model(input_ids=IDS, use_cache=False).logits
    with plain(model), torch.no_grad():
        assert (model(input_ids=IDS, use_cache=False).logits - merged).abs().max() < 1e-4


@SLOW
def test_checkpointing() -> None:
    model = tiny("llama")
    right = gradients(model)
    compiled(model)
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert furthest(gradients(model), right) < 1e-5


@SLOW
def test_a_second_backward() -> None:
    model = tiny("llama")
    compiled(model)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch._functorch.config.patch(donated_buffer=False):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_generation_does_not_compile() -> None:
    model = tiny("llama")
    counter = CompileCounterWithBackend("aot_eager")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    right = model.generate(input_ids=IDS[:, :5], **options)
    report = compiled(model, counter)
    assert torch.equal(model.generate(input_ids=IDS[:, :5], **options), right)
    assert counter.frame_count <= sum("norm" in path for path in report.record.compiled) * 3


def test_a_model_that_someone_else_compiles() -> None:
    """Nobody looks before a call inside: PEFT's own forward runs, and no stale value is used."""
    model = tiny("llama")
    compiled(model)
    gradients(model)
    whole = torch.compile(model, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
        got = whole(input_ids=IDS, use_cache=False).logits
        with plain(model):
            right = model(input_ids=IDS, use_cache=False).logits
    assert (got - right).abs().max() < 1e-4


def test_plain_takes_the_graphs_out_and_puts_them_back() -> None:
    model = tiny("llama")
    report = compiled(model)
    blocks = [model.get_submodule(path) for path in report.record.compiled]
    with plain(model):
        assert all(block._compiled_call_impl is None for block in blocks)
        assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(isinstance(block._compiled_call_impl, Entry) for block in blocks)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert "forward" in layer.__dict__


def test_torchs_settings_are_put_back() -> None:
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    before = dynamo.recompile_limit, functorch.activation_memory_budget
    model = tiny("llama")
    assert model.config.use_cache
    report = compiled(model, memory_budget=0.5)
    assert functorch.activation_memory_budget == 0.5
    assert not model.config.use_cache
    assert [choice["name"] for choice in report.record.choices] == ["model.use_cache"]
    report.undo()
    assert (dynamo.recompile_limit, functorch.activation_memory_budget) == before
    assert model.config.use_cache


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "updates", "missing", "on", "says"),
    [
        (CPU, 1000, None, False, "on a cpu compiling takes longer"),
        (GPU, 1000, None, True, "cold start"),
        (GPU, None, None, True, "cold start"),
        (GPU, 20, None, False, "20 updates do not pay"),
        (GPU, 1000, "there is no C++ compiler", False, "no C++ compiler"),
    ],
)
def test_the_automatic_choice(device, updates, missing, on, says, monkeypatch) -> None:
    monkeypatch.setattr(compiling, "_missing_compiler", lambda device: missing)
    choices = Choices()
    got, reason = decide("auto", device, updates, choices)
    assert got is on
    assert says in reason
    assert choices.get("training.compile").reason == reason


def test_asked_for_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "compiler_found", lambda: None)
    with pytest.raises(InputError) as raised:
        speed_up(tiny("llama"), compile=True)
    assert raised.value.code == "no_compiler"
    report = speed_up(tiny("llama"), compile="auto")
    assert "no C++ compiler" in str(report)
    assert speed_up(tiny("llama"), compile=False).record.choices == []


def test_wrong_uses_are_named() -> None:
    from families import family_model

    with pytest.raises(InputError) as raised:
        speed_up(family_model("llama"))
    assert raised.value.code == "nothing_adapted"
    with pytest.raises(InputError) as raised:
        speed_up(tiny("llama"), memory_budget=1.5)
    assert raised.value.code == "bad_budget"


@pytest.mark.parametrize(
    ("family", "first", "norms"),
    [
        ("llama", "base_model.model.model.layers.0", ["base_model.model.model.norm"]),
        ("gpt2", "base_model.model.transformer.h.0", []),
        ("bloom", "base_model.model.transformer.h.0", []),
        ("mixtral", "base_model.model.model.layers.0", ["base_model.model.model.norm"]),
        ("opt", "base_model.model.model.decoder.layers.0", []),
        ("mpt", "base_model.model.transformer.blocks.0", []),
    ],
)
def test_blocks_are_found(family, first, norms) -> None:
    from glasstune.adapters.lora_layers import adapted_modules

    model = tiny(family)
    blocks = find_blocks(model, adapted_modules(model))
    assert next(iter(blocks)) == first
    assert len(blocks) == 2
    assert list(find_norms(model, blocks)) == norms


@pytest.mark.timeout(400)
@pytest.mark.slow(reason="real code for a CPU: 60 s")
@pytest.mark.parametrize("bits", [32, 4, 8])
def test_inductor(bits) -> None:
    from glasstune.fast.probe import compiler_found

    if compiler_found() is None:
        pytest.skip("torch.compile makes CPU code with a C++ compiler; there is none")
    model = tiny("llama", bits)
    right = gradients(model)
    speed_up(model, compile=True)
    assert furthest(gradients(model), right) < 2e-5
    shorter = IDS[:, :9].contiguous()
    with plain(model):
        right = gradients(model, ids=shorter)
    assert furthest(gradients(model, ids=shorter), right) < 2e-5
