"""Loading at 16, 8 and 4 bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from tiny import save_tiny_model
from torch import nn

from glasstune.adapters.inject import add_adapter, trainable
from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.kernels.int8_linear import Int8Linear
from glasstune.kernels.int8_linear.reference import expand_rows, quantize_rows
from glasstune.models.load import autocast_dtype, choose_device, load_base
from glasstune.models.resolve import resolve_model

IDS = torch.arange(3, 35).reshape(2, 16)


def load(folder: Path, choices: Choices | None = None, **options):
    config = ModelConfig(path=str(folder), **{"device": "cpu", **options})
    choices = Choices() if choices is None else choices  # an empty one is false
    return load_base(config, resolve_model(str(folder)), choices=choices)


def bytes_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"bits": 8},
        {"bits": 8, "int8_compute": "llm_int8"},
        {"bits": 4},
        {"bits": 4, "quantization": {"bnb_4bit_quant_type": "fp4"}},
        {"bits": 4, "quantization": {"bnb_4bit_use_double_quant": False}},
        {"bits": 4, "dtype": "float32"},
        {"bits": 8, "dtype": "float16"},
        {"bits": 4, "dtype": "float16"},
    ],
    ids=str,
)
def test_every_precision_loads_frozen_and_trains(options, tiny_llama):
    truth = load(tiny_llama, dtype="float32")(input_ids=IDS).logits
    model = load(tiny_llama, **options)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False
    logits = model(input_ids=IDS).logits.float()
    # Near the exact model, and not equal to it where something was rounded.
    error = float((logits - truth).norm() / truth.norm())
    limit = {16: 0.03, 8: 0.06, 4: 0.5}[options.get("bits", 16)]
    assert error < limit
    assert (error == 0) == (options == {"dtype": "float32"})

    torch.manual_seed(0)
    adapted = add_adapter(model, r=4)
    adapted.train()
    kept = autocast_dtype(model)
    with torch.autocast("cpu", kept or torch.bfloat16, enabled=kept is not None):
        loss = adapted(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: p.grad for name, p in trainable(adapted).items()}
    assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients.values())
    assert all(grad.any() for name, grad in gradients.items() if "lora_B" in name)
    assert all(p.dtype == torch.float32 for p in trainable(adapted).values())


def test_float16_on_a_cpu_is_rounded_and_multiplied_in_float32(tiny_llama):
    choices = Choices()
    model = load(tiny_llama, choices, dtype="float16")
    exact = load(tiny_llama, dtype="float32")
    assert model.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).half().float())
    choice = choices.get("model.compute_dtype")
    assert choice is not None
    assert choice.value == "float32"
    assert "65,504" in choice.reason


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_int8_converts_what_transformers_converts(family, tmp_path):
    folder = save_tiny_model(tmp_path / family, family)
    theirs = load(folder, bits=8, int8_compute="llm_int8")
    ours = load(folder, bits=8)
    expected = {
        name
        for name, module in theirs.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear8bitLt)
    }
    converted = {name for name, m in ours.named_modules() if isinstance(m, Int8Linear)}
    assert converted == expected
    assert len(converted) >= 8
    for name in converted:
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight.data)


def test_int8_keeps_a_skip_list_and_says_how_many(tiny_llama):
    choices = Choices()
    model = load(
        tiny_llama, choices, bits=8, quantization={"llm_int8_skip_modules": ["lm_head", "q_proj"]}
    )
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj"] is nn.Linear
    assert kinds["model.layers.0.self_attn.k_proj"] is Int8Linear
    assert kinds["lm_head"] is nn.Linear
    choice = choices.get("model.quantized_layers")
    assert choice is not None
    assert choice.value == 12


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}])
def test_a_model_of_which_nothing_converts_is_an_error(options, tmp_path):
    """Falcon's linear layers are a class of their own: it would stay at 16 bit unsaid."""
    folder = save_tiny_model(tmp_path / "falcon", "falcon", alibi=False)
    with pytest.raises(InputError) as caught:
        load(folder, **options)
    assert caught.value.code == "nothing_quantized"
    assert "falcon" in caught.value.message


def test_conv1d_weights_are_turned(tmp_path):
    folder = save_tiny_model(tmp_path / "gpt2", "gpt2")
    plain = load(folder, dtype="float32")
    model = load(folder, bits=8, dtype="float32")
    weight = plain.transformer.h[0].attn.c_attn.weight.T.contiguous()
    module = model.transformer.h[0].attn.c_attn
    assert isinstance(module, Int8Linear)
    assert torch.equal(module.dequantize(), expand_rows(*quantize_rows(weight), torch.float32))
    error = model(input_ids=IDS).logits - plain(input_ids=IDS).logits
    assert error.norm() / plain(input_ids=IDS).logits.norm() < 0.05


def test_r03_nothing_is_cast_up_and_4_bit_is_smallest(tmp_path):
    """A large vocabulary: embeddings and head keep their 16 bits."""
    folder = save_tiny_model(tmp_path / "wide", vocab_size=4096)
    sizes = {bits: bytes_of(load(folder, bits=bits)) for bits in (16, 8, 4)}
    assert sizes[4] < sizes[8] < sizes[16]
    model = load(folder, bits=4)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.bfloat16
    adapted = add_adapter(model, r=2)
    assert adapted.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


def test_weights_that_are_missing_stop_the_load(tiny_llama, tmp_path):
    from glasstune.core.tensors import load_tensors, save_tensors

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "torn"))
    tensors = load_tensors(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_tensors(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj") as caught:
        load(folder)
    assert caught.value.code == "weights_missing"


def test_weights_that_are_absent_or_damaged_are_errors(tiny_llama, tmp_path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "bare"))
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(InputError) as caught:
        load(folder)
    assert caught.value.code == "cannot_load"
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError) as caught:
        load(folder)
    assert caught.value.code == "cannot_load"


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("evil_ran"),))


def test_pickled_weights_run_no_code(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError):
        load(folder)
    assert not Path("evil_ran").exists()


def test_a_checkpoints_own_quantisation_wins_and_is_said(tiny_llama, tmp_path):
    four = load(tiny_llama, bits=4)
    four.save_pretrained(tmp_path / "four")
    content = json.loads((tmp_path / "four" / "config.json").read_text())
    assert content["quantization_config"]["load_in_4bit"]
    choices = Choices()
    model = load(tmp_path / "four", choices, bits=16)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.support_avx512bf16_for_cpu is False
    assert "own settings win" in choices.get("model.quantization").reason
    ids = IDS.to(model.device)
    assert torch.equal(model(input_ids=ids).logits, four(input_ids=ids).logits)


def test_devices_are_chosen_and_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choices = Choices()
    assert choose_device("auto", choices) == torch.device("cpu")
    assert choices.get("model.device").value == "cpu"
    with pytest.raises(InputError, match="no CUDA device"):
        choose_device("cuda", Choices())


def test_an_attention_that_does_not_exist_is_an_error(tiny_llama):
    with pytest.raises(InputError) as caught:
        load(tiny_llama, attn_implementation="flash_attention_9")
    assert caught.value.code in ("cannot_load", "missing_package")


def test_families_with_a_soft_cap_get_the_attention_that_has_it(tmp_path):
    folder = save_tiny_model(tmp_path / "gemma2", "gemma2", head_dim=16)
    choices = Choices()
    assert load(folder, choices).config._attn_implementation == "eager"
    assert "soft cap" in choices.get("model.attn_implementation").reason


def _read_back_by_table(width: int) -> bool:
    """Whether bitsandbytes reads rows of a width back as code times scale, on this machine."""
    torch.manual_seed(1)
    weight = torch.randn(64, width, dtype=torch.bfloat16)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state).float()
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1).long()
    right = (state.code[codes].view(-1, 64) * state.absmax[:, None]).view(64, width)
    return torch.allclose(theirs, right, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("hidden", [64, 96])
def test_4_bit_rows_that_this_cpu_misreads_are_said(hidden, tmp_path):
    """With AVX-512, bitsandbytes 0.50.2 takes scales of other blocks for rows of 96."""
    folder = save_tiny_model(tmp_path / "m", hidden_size=hidden, intermediate_size=128)
    choices = Choices()
    load(folder, choices, bits=4)
    choice = choices.get("model.misread_4bit_layers")
    assert (choice is None) == _read_back_by_table(hidden)
    if choice is not None:
        # Two blocks: q, k, v and o, gate and up read rows of 96; down reads rows of 128.
        assert choice.value == 2 * 6
        assert "rows of 96 weights" in choice.reason
        assert "model.layers.0.self_attn.q_proj" in choice.reason


def test_misread_rows_are_seen_on_any_cpu(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "m", hidden_size=72, intermediate_size=128)
    choices = Choices()
    load(folder, choices, bits=4)
    assert choices.get("model.misread_4bit_layers") is None  # 72 is no multiple of 16
    real = bitsandbytes.functional.dequantize_4bit

    def shifted(packed, state):
        state.absmax = state.absmax.roll(1)
        return real(packed, state)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", shifted)
    load(folder, choices, bits=4)
    choice = choices.get("model.misread_4bit_layers")
    assert choice is not None
    assert choice.value == 12
    assert choice.reason.startswith("warning: bitsandbytes reads 4-bit rows of 72 weights")
    load(folder, others := Choices(), bits=8)
    assert others.get("model.misread_4bit_layers") is None
