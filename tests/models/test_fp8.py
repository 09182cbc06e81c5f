"""What float8 products cost each layer, against e4m3 worked out in fp64; which layers are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from glasstune.core.choices import Choices
from glasstune.core.config import Config, ModelConfig
from glasstune.core.errors import InputError
from glasstune.core.fp8 import Fp8Record
from glasstune.models import fp8
from glasstune.models.fp8_report import measure_fp8
from glasstune.models.load import load_base
from glasstune.models.resolve import resolve_model
from glasstune.models.training_base import TrainingBase
from glasstune.reports.fp8_text import fp8_lines

ROWS, LENGTH, PADDED = 3, 40, 10
TOKENS = ROWS * LENGTH - PADDED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


def load(folder: Path, bits: int = 16) -> Any:
    config = ModelConfig(path=str(folder), bits=bits, dtype="bfloat16", device="cpu")
    choices = Choices()
    found = resolve_model(config.path, trust_remote_code=False, choices=choices)
    return load_base(config, found, choices=choices)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and targets; the second row ends in padding."""
    ids = torch.randint(2, 500, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -PADDED:] = 0
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    targets[mask.roll(-1, 1) == 0] = -100
    return ids, mask, targets


def measured(model: Any) -> Fp8Record:
    record = measure_fp8(model, fp8.candidates(model, None), *batch())
    record.decide()
    return record


def e4m3(values: Tensor) -> Tensor:
    """Rounds fp64 numbers of at most 448 to 4 significant bits, from 2**-6 on fewer."""
    exponent = torch.floor(torch.log2(values.abs().clamp(min=1e-300))).clamp(min=-6)
    step = 2.0 ** (exponent - 3)
    return torch.round(values / step) * step


def float8(rows: Tensor) -> Tensor:
    """Rows in units of the least power of two so that none of a row's values exceeds 448."""
    peaks = rows.abs().amax(1, keepdim=True).clamp(min=1e-300)
    scale = 2.0 ** torch.ceil(torch.log2(peaks / 448))
    return e4m3(rows / scale) * scale


def far(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def weight_of(module: Any, bits: int) -> Tensor:
    """The weight that a layer stands for, by bitsandbytes or by hand."""
    if bits == 4:
        from bitsandbytes import functional

        state = module.weight.quant_state
        state.dtype = torch.float32
        weight = functional.dequantize_4bit(module.weight.data, state)
        state.dtype = torch.bfloat16
        return weight.double()
    if bits == 8:
        return module.rows.double() * module.scale.double()[:, None] / 127
    return module.weight.detach().double()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_errors_are_those_of_e4m3_worked_out_by_hand(folder, bits) -> None:
    model = load(folder, bits)
    ids, mask, targets = batch()
    layers = fp8.candidates(model, None)
    assert len(layers) == 14
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for path, module in layers:

        def watch(_: Any, given: Any, output: Tensor, path: str = path) -> None:
            real = mask.bool()
            seen[path] = [given[0][real].detach().double()]
            output.register_hook(lambda g: seen[path].append(g[real].double()))

        hooks.append(module.register_forward_hook(watch))
    model.enable_input_require_grads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    model.disable_input_require_grads()
    for hook in hooks:
        hook.remove()
    record = measured(model)
    assert record.tokens == TOKENS
    assert record.documents == ROWS
    for layer, (path, module) in zip(record.layers, layers, strict=True):
        x, gradient = seen[path]
        weight = weight_of(module, bits)
        rounded = float8(weight)
        assert layer.path == path
        assert layer.rows == TOKENS
        assert layer.weight_error == pytest.approx(far(rounded, weight), rel=1e-3)
        plain = weight.to(torch.bfloat16).double()
        want, got = x @ plain.t(), float8(x) @ rounded.t()
        # Both products are rounded to bfloat16 here: 0.0017 beside 0.037.
        assert layer.output_error == pytest.approx(far(got, want), rel=0.01)
        rows = (got - want).norm(dim=1) / want.norm(dim=1)
        assert layer.row_error == pytest.approx(float(rows.median()), rel=0.02)
        back = float8(gradient) @ rounded
        assert layer.gradient_error == pytest.approx(far(back, gradient @ plain), rel=0.01)
        peaks = [row.abs().max() / row[row != 0].abs().median() for row in x]
        assert layer.peak == pytest.approx(float(max(peaks)), rel=1e-3)
    assert record.kept == {}


def test_measuring_leaves_the_model_as_it_was(folder) -> None:
    model = load(folder)
    ids = batch()[0]
    before = model(ids).logits
    measured(model)
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(value.requires_grad or value.grad is not None for value in model.parameters())


def plant(folder: Path, change: Callable[[Any], None]) -> Any:
    model = load(folder)
    with torch.no_grad():
        change(model)
    return model


def outlier_channel(model: Any) -> None:
    """One channel of a block's inner input is huge, and nothing multiplies it."""
    block = model.model.layers[1]
    block.post_attention_layernorm.weight[5] = 1e6
    for part in (block.mlp.gate_proj, block.mlp.up_proj):
        part.weight[:, 5] = 0


def outlier_gradient(model: Any) -> None:
    """One channel of the residual stream is zero everywhere, and has a huge gradient."""
    model.model.embed_tokens.weight[:, 5] = 0
    for block in model.model.layers:
        block.self_attn.o_proj.weight[5] = 0
        block.mlp.down_proj.weight[5] = 0
    model.model.norm.weight[5] = 1e6


def huge_tokens(model: Any) -> None:
    """Some tokens are ten thousand times as large as others: each row has its own scale."""
    model.model.embed_tokens.weight[::7] *= 1e4


@pytest.mark.parametrize(
    ("change", "kept", "named"),
    [
        (outlier_channel, ["1.mlp.gate_proj", "1.mlp.up_proj"], "output"),
        (
            outlier_gradient,
            ["0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.down_proj"],
            "gradient",
        ),
        (huge_tokens, [], ""),
        (lambda model: None, [], ""),
    ],
    ids=["channel", "gradient", "tokens", "none"],
)
def test_exactly_the_layers_that_outliers_spoil_are_kept(folder, change, kept, named) -> None:
    record = measured(plant(folder, change))
    assert list(record.kept) == [f"model.layers.{path}" for path in kept]
    for path, reason in record.kept.items():
        layer = next(layer for layer in record.layers if layer.path == path)
        assert named in reason
        error = layer.output_error if named == "output" else layer.gradient_error
        assert error is not None
        assert error > 0.3
        assert f"{error:.3f} off" in reason
        assert max(layer.vanished, layer.gradient_vanished) > 0.3
    text = "\n".join(fp8_lines(record.to_dict()))
    for path in record.kept:
        assert f"kept in bfloat16: {path}: " in text
    assert bool(kept) == ("kept in bfloat16: none" not in text)
    if change is outlier_channel:
        spoiled = next(layer for layer in record.layers if layer.path in record.kept)
        assert spoiled.outliers == pytest.approx(1 / 64)
        assert spoiled.peak > 1e5


def test_an_input_of_zeros_is_no_error(folder) -> None:
    def nothing(model: Any) -> None:
        model.model.layers[0].mlp.gate_proj.weight.zero_()

    record = measured(plant(folder, nothing))
    layers = {layer.path: layer for layer in record.layers}
    down = layers["model.layers.0.mlp.down_proj"]
    assert down.zero_rows == down.rows == TOKENS
    assert down.output_error is None
    assert down.row_error is None
    assert down.gradient_error == pytest.approx(0.037, abs=0.01)
    gate = layers["model.layers.0.mlp.gate_proj"]
    assert gate.weight_error is None
    assert gate.output_error is None
    assert record.kept == {}


def test_a_value_at_bfloat16s_limit_overflows_in_float8_and_keeps_its_layer(folder) -> None:
    def limit(model: Any) -> None:
        # The e4m3 number nearest to 3.36e38 is 2**128: beyond float32, whoever multiplies.
        block, seen = model.model.layers[1], []
        norm = block.post_attention_layernorm
        hook = norm.register_forward_hook(lambda *given: seen.append(given[2]))
        ids, mask, _ = batch()
        model(ids)
        hook.remove()
        largest = seen[0][mask.bool()][:, 5].abs().max()
        block.mlp.gate_proj.weight[:, 5] = 0
        block.mlp.gate_proj.weight[0] = 0
        block.mlp.gate_proj.weight[0, 5] = 1
        block.mlp.up_proj.weight[:, 5] = 0
        block.mlp.up_proj.weight[0] = 0
        norm.weight[5] = 3.36e38 / float(largest)

    record = measured(plant(folder, limit))
    gate = next(layer for layer in record.layers if layer.path == "model.layers.1.mlp.gate_proj")
    assert gate.overflowed >= 1
    assert "overflow" in record.kept[gate.path]
    found = next(found for found in record.findings if found.code == "fp8_overflow")
    assert found.where == gate.path
    assert f"kept in bfloat16: {gate.path}: " in "\n".join(fp8_lines(record.to_dict()))


def test_rows_that_are_not_finite_are_left_out_and_said(folder) -> None:
    ids, _, _ = batch()
    once = next(int(token) for token in ids[0] if int((ids == token).sum()) == 1)

    def hole(model: Any) -> None:
        model.model.embed_tokens.weight[once] = float("nan")

    record = measured(plant(folder, hole))
    found = next(found for found in record.findings if found.code == "not_finite")
    assert found.severity == "warning"
    first = record.layers[0]
    assert found.where == first.path
    assert first.output_error == pytest.approx(0.037, abs=0.01)
    # The loss is NaN, and so are the gradients of that row's tokens, but no other row's.
    assert first.bad_rows >= LENGTH
    assert first.gradient_error == pytest.approx(0.037, abs=0.01)
    assert record.kept == {}


def test_a_weight_that_is_not_finite_is_refused_by_name(folder) -> None:
    def hole(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("inf")

    with pytest.raises(InputError) as caught:
        measured(plant(folder, hole))
    assert caught.value.code == "bad_weights"
    assert caught.value.where == "model.layers.1.mlp.up_proj.weight"


def test_a_width_that_float8_does_not_take_is_kept_with_its_reason(tmp_path) -> None:
    folder = save_tiny_model(tmp_path / "odd", intermediate_size=72)
    record = measured(load(folder))
    assert {path.rsplit(".", 1)[-1] for path in record.kept} == {
        "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert all("multiples of 16" in reason for reason in record.kept.values())


def test_a_layer_that_no_row_reaches_is_said_and_not_kept(folder) -> None:
    model = load(folder)
    model.add_module("spare", torch.nn.Linear(32, 32, dtype=torch.bfloat16))
    layers = [*fp8.candidates(model, None)[:1], ("spare", model.spare)]
    record = measure_fp8(model, layers, *batch())
    assert record.decide() == {}
    assert [found.where for found in record.findings if found.code == "not_seen"] == ["spare"]
    assert record.layers[1].output_error is None


def config_of(keep: Any, **quantization: Any) -> Config:
    return Config(
        model={"path": "m", "dtype": "bfloat16", "quantization": quantization},
        data={"sources": [{"path": "rows.json"}]},
        training={"compute": "fp8", "fp8_keep": keep},
    )


def test_layers_are_kept_by_path_ending_or_glob(folder) -> None:
    keep = ["down_proj", "model.layers.0.self_attn.q_proj", "layers.1.*"]
    model = load(folder)
    done = fp8.to_fp8(model, config_of(keep), Choices())
    assert done == [
        f"model.layers.0.{part}"
        for part in (
            "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj",
        )
    ]  # fmt: skip
    assert type(model.model.layers[1].self_attn.q_proj) is torch.nn.Linear


def test_an_unknown_name_is_refused(folder) -> None:
    with pytest.raises(InputError) as caught:
        fp8.to_fp8(load(folder), config_of(["down_proj", "experts"]), Choices())
    assert caught.value.code == "no_such_layer"
    assert "'experts'" in caught.value.message
    assert "down_proj" in str(caught.value.fix)


def test_nothing_left_to_convert_is_refused(folder) -> None:
    with pytest.raises(InputError) as caught:
        fp8.to_fp8(load(folder), config_of(["model.*"]), Choices())
    assert caught.value.code == "nothing_quantized"
    assert caught.value.where == "training.fp8_keep"


class FakeCuda(SimpleNamespace):
    """torch.cuda of another machine."""


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test Card 3000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return torch.device("cuda")


@pytest.mark.parametrize("capability", [(8, 6), (7, 5), (8, 0)])
def test_an_older_gpu_is_told_what_is_wrong_and_what_to_use(monkeypatch, capability) -> None:
    device = on_a_gpu(monkeypatch, capability)
    with pytest.raises(InputError) as caught:
        fp8.check_device(device)
    error = caught.value
    assert error.code == "no_fp8"
    assert error.where == "training.compute"
    assert "Test Card 3000" in error.message
    assert f"{capability[0]}.{capability[1]}" in error.message
    assert "8.9" in error.message
    assert "bfloat16" in str(error.fix)
    assert "model.bits: 8" in str(error.fix)


def test_a_gpu_whose_product_fails_says_its_own_words(monkeypatch) -> None:
    device = on_a_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *a, **k: torch.zeros(32, 32, dtype=torch.bfloat16))

    def broken(*given: Any) -> Any:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore lines")

    monkeypatch.setattr(fp8, "fp8_rows", broken)
    with pytest.raises(InputError) as caught:
        fp8.check_device(device)
    assert caught.value.message.endswith("CUBLAS_STATUS_NOT_SUPPORTED")


def test_a_cpu_needs_no_float8() -> None:
    fp8.check_device(torch.device("cpu"))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_merge_adds_to_the_numbers_that_training_multiplied_by(folder, bits) -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    config = ModelConfig(path=str(folder), bits=bits, dtype="bfloat16")
    trained = TrainingBase(empty, config, ["q_proj"])
    assert trained.label.endswith("bfloat16, rounded to float8")
    model = load(folder, bits)
    stored = load_file(folder / "model.safetensors")
    for path, rounded in (("mlp.up_proj", True), ("self_attn.q_proj", False)):
        name = f"model.layers.1.{path}"
        weight = weight_of(model.get_submodule(name), bits)
        want = (float8(weight) if rounded else weight).to(torch.bfloat16)
        assert torch.equal(trained(f"{name}.weight", stored[f"{name}.weight"]), want)
