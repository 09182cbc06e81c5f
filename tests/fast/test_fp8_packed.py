"""Packed bases with float8 products under `speed_up`, beside float8 layers of the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER
from families import family_model
from peft import LoraConfig
from speeding import (
    IDS,
    adapted,
    distance,
    fill,
    furthest,
    gradients,
    quantize,
    wide_enough,
    widened,
)
from torch._dynamo.testing import CompileCounterWithBackend

from glasstune.fast.speed_up import plain, speed_up
from glasstune.kernels.fp8 import Fp8Linear, extra_columns
from glasstune.models.fp8 import mark_fp8
from glasstune.models.packed import is_four_bit

pytestmark = QUIET_COMPILER
SLOW = pytest.mark.slow(reason="the compiler takes 5 to 15 s a case")


def base(bits: int, family: str = "llama", layers: int | None = None) -> Any:
    sizes = wide_enough(family)
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    model = family_model(family, **sizes).to(torch.bfloat16)
    quantize(model, bits)
    return model


def pair(bits: int, family: str = "llama", **options: Any) -> tuple[Any, Any]:
    """Returns a packed model that asks for float8, and one of float8 layers, not sped up."""
    model = base(bits, family)
    other = copy.deepcopy(model)
    assert mark_fp8(model)
    to_float8(other)
    return adapted(model, **options), adapted(other, **options)


def speeded(bits: int, family: str = "llama", **options: Any) -> tuple[Any, Any, Any]:
    """Returns both sped up, and the report of the packed one."""
    model, other = pair(bits, family, **options)
    speed_up(other, compile=False)
    return model, other, speed_up(model, compile=False)


def to_float8(model: Any) -> None:
    """Replaces packed layers by float8 ones of what their own library expands."""
    from bitsandbytes.functional import dequantize_4bit

    for path, module in list(model.named_modules()):
        if is_four_bit(module):
            state = copy.deepcopy(module.weight.quant_state)
            state.dtype = torch.float32  # rounded to bfloat16 before, it would be rounded twice
            weight = dequantize_4bit(module.weight.data, state)
        elif type(module).__name__ == "Int8Linear":
            weight = module.dequantize()
        else:
            continue
        model.set_submodule(path, Fp8Linear.from_weight(weight.float(), module.bias))
    model.is_loaded_in_4bit = False


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=IDS, use_cache=False).logits.float()


# Both are computed alike, but for columns whose powers of two a group shares.
ALIKE = 0.01


def agree(model: Any, other: Any) -> None:
    """The other is brought to the same adapter values first."""
    values = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for name, parameter in other.named_parameters():
        if name in values:
            parameter.data.copy_(values[name].data)
    got, want = gradients(model, True), gradients(other, True)
    assert distance(got, want) < ALIKE
    one, two = logits(model), logits(other)
    assert float((one - two).norm() / two.norm()) < ALIKE


@pytest.mark.parametrize(
    ("bits", "family"),
    [(4, "llama"), (8, "llama"), (4, "qwen2"), (4, "bloom"), (8, "gpt2"), (8, "phi3")],
)
def test_whole_models_compute_what_float8_layers_do(bits, family) -> None:
    model, other = pair(bits, family)
    with torch.no_grad():
        sixteen = logits(model)
    report = speed_up(model, compile=False)
    speed_up(other, compile=False)
    agree(model, other)
    assert {group.way for group in report.groups} == {"wide"}
    assert {module.bits for module in report.record.modules} == {bits}
    assert all(module.reason.endswith("; expanded to float8") for module in report.record.modules)
    # It is no 16-bit product under another name.
    assert float((logits(model) - sixteen).norm() / sixteen.norm()) > ALIKE


def test_without_loras_columns_that_fails(monkeypatch) -> None:
    from glasstune.fast import fp8_packed

    monkeypatch.setattr(fp8_packed, "write_low", lambda *_: None)
    model, other, _ = speeded(4)
    with pytest.raises(AssertionError):
        agree(model, other)


@pytest.mark.parametrize("bits", [4, 8])
def test_as_far_from_float32_as_float8_layers_are(bits) -> None:
    packed = base(bits)
    truth = gradients(adapted(widened(packed)))
    model, other, _ = speeded(bits)
    far, theirs = distance(gradients(model, True), truth), distance(gradients(other, True), truth)
    assert 0 < far < 1.05 * theirs


def step(model: Any) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    torch.optim.AdamW(trained, lr=0.05).step()
    model.zero_grad(set_to_none=True)


def through_data(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.7)


def rescale(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.25)


def other_rank(model: Any) -> None:
    model.add_adapter("more", LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=12))
    fill(model)
    model.set_adapter("more")


def cast(model: Any) -> None:
    model.to(torch.float32).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("bits", "change"),
    [(4, step), (8, through_data), (4, rescale), (4, other_rank), (8, other_rank), (8, cast)],
)
def test_changes_are_seen(bits, change) -> None:
    model, other, report = speeded(bits)
    before = logits(model)
    change(model)
    if change in (rescale, other_rank, cast):
        change(other)
    agree(model, other)
    if change is not cast:
        assert float((logits(model) - before).abs().max()) > 0.01
    assert {group.way for group in report.groups} == {"wide"}


def test_another_adapter_and_back_again(monkeypatch) -> None:
    from glasstune.fast import fp8_packed

    model, other, _ = speeded(4)
    # The weights stay: they are not looked through again.
    monkeypatch.setattr(fp8_packed, "weight_scales", None)
    first = logits(model)
    other_rank(model)
    assert float((logits(model) - first).abs().max()) > 0.01
    model.set_adapter("default")
    fill(model)
    agree(model, other)


def test_int8_rows_that_are_loaded_have_powers_of_two_of_their_own() -> None:
    model, _ = pair(8)
    speed_up(model, compile=False)
    before = logits(model)
    state = {
        name: value * 64 if name.endswith("base_layer.scale") else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    after = logits(model)
    other = adapted(_float8_of(model))
    other.load_state_dict({n: v for n, v in state.items() if "lora_" in n}, strict=False)
    assert torch.isfinite(after).all()
    assert float((after - before).norm() / before.norm()) > 0.1
    speed_up(other, compile=False)
    want = logits(other)
    assert float((after - want).norm() / want.norm()) < ALIKE


def _float8_of(model: Any) -> Any:
    other = copy.deepcopy(model).unload()
    to_float8(other)
    return other


@pytest.mark.parametrize("bits", [4, 8])
def test_dropout_leaves_the_bases_product_in_float8(bits) -> None:
    model, other, report = speeded(bits, lora_dropout=0.4)
    assert {module.way for module in report.record.modules} == {"grouped"}  # single ones as well
    found = []
    for one in (model, other):
        one.train()
        torch.manual_seed(3)
        found.append(gradients(one, True))
    if bits == 8:  # PEFT's 4-bit layers draw other masks
        assert distance(*found) < ALIKE
    with plain(model):
        torch.manual_seed(3)
        assert distance(found[0], gradients(model, True)) > 3 * ALIKE
    model.eval()
    other.eval()
    agree(model, other)
    assert {group.way for group in report.groups} == {"wide"}


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit:UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_switched_off_is_pefts_own_and_16_bit(bits) -> None:
    model, other, report = speeded(bits)
    right = logits(model)
    with model.disable_adapter():
        got = logits(model)
        assert {group.way for group in report.groups} == {"plain"}
        with plain(model):
            assert torch.equal(got, logits(model))
    assert torch.equal(logits(model), right)
    agree(model, other)


def test_a_token_without_a_gradient_is_bitsandbytes_own() -> None:
    model, _ = pair(4)
    speed_up(model, compile=False)
    one = IDS[:1, :1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model(input_ids=one, use_cache=False).logits
        with plain(model):
            assert torch.equal(got, model(input_ids=one, use_cache=False).logits)


@pytest.mark.parametrize("bits", [4, 8])
def test_marks_are_never_mixed_within_a_group_and_changes_are_seen(bits) -> None:
    model = base(bits)
    marked = mark_fp8(model, keep=["q_proj", "down_proj"])
    assert marked
    assert not any(path.endswith(("q_proj", "down_proj")) for path in marked)
    model = adapted(model)
    report = speed_up(model, compile=False)
    names = [{path.rsplit(".", 1)[-1] for path in group.paths} for group in report.groups[:5]]
    assert names[:2] == [{"q_proj"}, {"k_proj", "v_proj"}]
    assert [group.fp8 for group in report.groups[:2]] == [False, True]
    told = {m.path.rsplit(".", 1)[-1]: m.reason for m in report.record.modules}
    assert "float8" not in told["q_proj"]
    assert "expanded to float8" in told["k_proj"]
    mark_fp8(model.get_base_model(), keep=["*"])
    got = logits(model)
    assert not any(group.fp8 for group in report.groups)
    never = base(bits)
    mark_fp8(never, keep=["q_proj", "down_proj"])  # the same groups
    never = adapted(never)
    speed_up(never, compile=False)
    assert float((got - logits(never)).abs().max()) > 0
    mark_fp8(never.get_base_model(), keep=["*"])
    assert torch.equal(got, logits(never))
    mark_fp8(model.get_base_model(), keep=["k_proj.base_layer"])  # of a group that holds v_proj too
    logits(model)
    assert report.groups[1].way == "plain"
    assert "no longer of one kind" in report.groups[1].reason


def test_what_stays_plain_is_said_to_be_16_bit() -> None:
    model, _ = pair(4, use_dora=True)
    report = speed_up(model, compile=False)
    for module in report.record.modules:
        assert module.way == "plain"
        assert "its products are 16 bit, though float8 was asked for" in module.reason


def test_a_weight_that_is_no_number_stays_plain_and_is_said() -> None:
    model = base(8)
    mark_fp8(model)
    layer = model.model.layers[0].mlp.down_proj
    layer.scale[3] = float("nan")
    report = speed_up(adapted(model), compile=False)
    (module,) = [m for m in report.record.modules if m.way == "plain"]
    assert module.path.endswith("0.mlp.down_proj")
    assert module.reason.startswith("the weight holds NaN or Inf; its products are 16 bit")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_step_between_forward_and_backward_is_an_error(bits) -> None:
    model, _ = pair(bits)
    speed_up(model, compile=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    step(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_scale_between_forward_and_backward_is_an_error() -> None:
    """It changes neither A nor B, but what stands of them behind the weight."""
    model, _ = pair(4)
    speed_up(model, compile=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    rescale(model)
    logits(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bits", [4, 8])
def test_undo_and_copies(bits) -> None:
    model, other = pair(bits)
    speed_up(other, compile=False)
    before = gradients(model, True)
    report = speed_up(model, compile=False)
    agree(model, other)
    twin = copy.deepcopy(model)  # has no group: PEFT's own forward
    report.undo()
    assert furthest(gradients(model, True), before) == 0
    assert furthest(gradients(twin, True), before) == 0
    speed_up(twin, compile=False)
    agree(twin, other)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=SLOW)])
def test_compiled_layers_share_their_graphs_and_keep_no_expanded_weight(bits) -> None:
    model = base(bits, layers=4)
    mark_fp8(model)
    model = adapted(model)
    report = speed_up(model, compile=False)
    right = gradients(model, True)
    report.undo()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options = {"backend": counter, "dynamic": False, "fullgraph": True}
    report = speed_up(model, compile=True, compile_options=options, memory_budget=0.3)
    first = gradients(model, True)
    assert furthest(first, right) < 0.02  # a last bit of bfloat16 moves a float8 number
    norms = sum("norm" in path for path in report.record.compiled)
    step(model)
    kept: list[torch.Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    assert counter.frame_count == 2 + norms
    shapes = {tuple(tensor.shape) for tensor in kept}
    wides = set()
    for group in report.groups:
        n, i, extra = group.layout.rows, group.layout.width, extra_columns(group.layout)
        wides |= {(n, i + extra), (i, n + extra)}
    assert len(kept) > 10
    assert not shapes & wides
    report.undo()


@pytest.mark.slow(reason="the compiler takes 15 s")
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_compiled_by_inductor(bits) -> None:
    truth = gradients(adapted(widened(base(bits))))
    model, _, report = speeded(bits)
    want = gradients(model, True)
    report.undo()
    torch._dynamo.reset()
    report = speed_up(model, compile=True)
    got = gradients(model, True)
    report.undo()
    # A last bit of bfloat16 moves a float8 number to its neighbour: both are as far from the truth.
    assert distance(got, truth) < 1.3 * distance(want, truth) + 0.01
