"""Options of bitsandbytes by name, its 4-bit layers on a CPU, its optimiser."""

from __future__ import annotations

import copy
import io

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16

from glasstune.adapters.base import base_only
from glasstune.adapters.inject import add_adapter, trainable
from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.models import load
from glasstune.models.load import load_base
from glasstune.models.quantization import adam_8bit, bnb_config, int8_compute
from glasstune.models.resolve import resolve_model

IDS = torch.arange(3, 35).reshape(2, 16)


def configured(bits: int, **quantization):
    choices = Choices()
    config = ModelConfig(path="x", bits=bits, quantization=quantization)
    return bnb_config(config, torch.bfloat16, choices), choices


def test_four_bit_defaults_are_said():
    config, choices = configured(4)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert {choice.name for choice in choices} == {
        "model.quantization.bnb_4bit_quant_type",
        "model.quantization.bnb_4bit_use_double_quant",
        "model.quantization.bnb_4bit_compute_dtype",
    }


def test_every_option_goes_through_by_its_own_name():
    config, choices = configured(
        4,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype="float32",
        bnb_4bit_quant_storage="bfloat16",
        llm_int8_skip_modules=["lm_head", "q_proj"],
    )
    assert config.bnb_4bit_quant_type == "fp4"
    assert not config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.float32
    assert config.bnb_4bit_quant_storage == torch.bfloat16
    assert config.llm_int8_skip_modules == ["lm_head", "q_proj"]
    assert len(choices) == 0
    config, _ = configured(8, llm_int8_threshold=5, llm_int8_has_fp16_weight=False)
    assert config.load_in_8bit
    assert config.llm_int8_threshold == 5.0


@pytest.mark.parametrize(
    ("bits", "options", "code", "says"),
    [
        (4, {"bnb_4bit_quant_typ": "nf4"}, "unknown_key", "bnb_4bit_quant_type"),
        (4, {"load_in_8bit": True}, "contradiction", "model.bits=8"),
        (16, {"load_in_4bit": True}, "contradiction", "model.bits=4"),
        (4, {"load_in_4bit": False}, "contradiction", "model.bits is 4"),
        (8, {"bnb_4bit_quant_type": "nf4"}, "contradiction", "model.bits=4"),
        (4, {"llm_int8_threshold": 6.0}, "contradiction", "model.bits=8"),
        (4, {"bnb_4bit_quant_type": "int4"}, "bad_value", "nf4 or fp4"),
        (4, {"bnb_4bit_compute_dtype": "bf16"}, "bad_value", "bf16"),
        (4, {"llm_int8_skip_modules": "lm_head"}, "bad_value", "list"),
    ],
)
def test_wrong_options_are_named(bits, options, code, says):
    with pytest.raises(InputError) as caught:
        configured(bits, **options)
    assert caught.value.code == code
    assert says in str(caught.value)
    assert caught.value.where.startswith("model.quantization")


def test_a_threshold_selects_llm_int8_and_is_said():
    choices = Choices()
    config = ModelConfig(path="x", bits=8, quantization={"llm_int8_threshold": 6.0})
    assert int8_compute(config, choices) == "llm_int8"
    choice = choices.get("model.int8_compute")
    assert choice is not None
    assert "llm_int8_threshold" in choice.reason
    assert bnb_config(config, torch.bfloat16, choices) is not None
    assert bnb_config(ModelConfig(path="x", bits=8), torch.bfloat16, Choices()) is None


def four_bit_model(folder, guarded: bool, monkeypatch):
    if not guarded:
        monkeypatch.setattr(load, "guard_cpu_4bit", lambda model: 0)
    config = ModelConfig(path=str(folder), bits=4, device="cpu")
    model = load_base(config, resolve_model(str(folder)), choices=Choices())
    torch.manual_seed(0)
    model = add_adapter(model, r=4)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def snapshot(model) -> list[torch.Tensor]:
    """Expanded weights, training logits and every adapter gradient."""
    expanded = [
        dequantize_4bit(module.weight.data, module.weight.quant_state)
        for module in model.modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    ]
    model.train()
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return [*expanded, logits.detach(), *(p.grad.clone() for p in trainable(model).values())]


def look(model, how: str) -> None:
    if how == "evaluation":
        model.eval()
        with torch.no_grad():
            model(input_ids=IDS)
    elif how == "kl_to_base":
        model.eval()
        with torch.no_grad(), base_only(model):
            model(input_ids=IDS)
    else:
        model.eval()
        model.generate(input_ids=IDS[:, :4], max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("how", ["evaluation", "kl_to_base", "generation"])
def test_e02_looking_at_a_4_bit_model_changes_nothing(how, tiny_llama, monkeypatch):
    model = four_bit_model(tiny_llama, True, monkeypatch)
    before = snapshot(model)
    look(model, how)
    for one, other in zip(snapshot(model), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
def test_e02_is_real_on_this_cpu(tiny_llama, monkeypatch):
    """Without the guard one evaluation ruins the model: the test above can fail."""
    if not has_avx512bf16():
        pytest.skip("E02 did not run: this CPU has no avx512_bf16, where bitsandbytes repacks")
    model = four_bit_model(tiny_llama, False, monkeypatch)
    before = snapshot(model)
    look(model, "evaluation")
    after = snapshot(model)
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def train(make, steps: int, state: dict | None = None, start: list | None = None):
    torch.manual_seed(0)
    values = [torch.nn.Parameter(torch.randn(64, 128) * 0.02), torch.nn.Parameter(torch.zeros(8))]
    targets = [torch.randn(64, 128), torch.randn(8)]
    if start is not None:
        for value, old in zip(values, start, strict=True):
            value.data = old.clone()
    optimizer = make(values)
    if state is not None:
        optimizer.load_state_dict(state)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((v - t).square().mean() for v, t in zip(values, targets, strict=True)).backward()
        optimizer.step()
    return [v.detach() for v in values], optimizer


def eight_bit(values):
    return adam_8bit(values, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def test_8bit_adam_is_near_adam_and_resumes_to_the_bit():
    exact, _ = train(lambda v: torch.optim.AdamW(v, lr=1e-2, weight_decay=0.01), 20)
    coarse, optimizer = train(eight_bit, 20)
    assert any(
        tensor.dtype == torch.uint8
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    )
    # 256 levels a block of 256 values: a few per cent, and small tensors keep float32 moments.
    assert 0 < (coarse[0] - exact[0]).norm() / exact[0].norm() < 0.1
    torch.testing.assert_close(coarse[1], exact[1])

    half, optimizer = train(eight_bit, 10)
    file = io.BytesIO()
    torch.save(copy.deepcopy(optimizer.state_dict()), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, _ = train(eight_bit, 10, state, half)
    for one, other in zip(resumed, coarse, strict=True):
        assert torch.equal(one, other)


def test_8bit_adam_without_a_library_is_an_error(monkeypatch):
    from bitsandbytes import cextension

    monkeypatch.setattr(
        cextension, "lib", object.__new__(cextension.ErrorHandlerMockBNBNativeLibrary)
    )
    with pytest.raises(InputError, match="native library"):
        eight_bit([torch.nn.Parameter(torch.zeros(2))])
