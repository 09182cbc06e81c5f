"""The training's base against what a real load at that precision computes with."""

from __future__ import annotations

import pytest
import torch
from battery import battery_config, real_load, save_battery_model

from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.models.empty import empty_model
from glasstune.models.load import load_base
from glasstune.models.resolve import resolve_model
from glasstune.models.training_base import TrainingBase

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def _ours(name, bits, options, dtype, int8="w8a16"):
    model = empty_model(battery_config(name))
    config = ModelConfig(path="-", bits=bits, quantization=options, dtype=dtype, int8_compute=int8)
    return TrainingBase(model, config)


def _stored(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["bloom", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [NF4, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}],
    ids=["nf4_double", "fp4"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_four_bit_is_bitsandbytes_own(name, options, dtype, tmp_path):
    import bitsandbytes

    folder = save_battery_model(name, tmp_path)
    real = real_load(folder, 4, options, getattr(torch, dtype))
    ours = _ours(name, 4, options, dtype)
    stored = _stored(folder)
    packed = 0
    for path, module in real.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        weight = module.weight
        if weight.quant_state.shape[-1] % 64:  # this CPU may read such rows back wrong
            continue
        theirs = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        key = f"{path}.weight"
        made = ours(key, stored[key] if key in stored else stored[key.removeprefix("transformer.")])
        made = made.T if name == "gpt2" else made
        assert torch.equal(made, theirs.to(made.dtype)), key
        packed += 1
    assert packed or name == "gpt2"
    kept = "transformer.h.0.ln_1.weight" if name == "gpt2" else "transformer.ln_f.weight"
    assert ours(kept, torch.full((3,), 1.001)).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("int8", ["w8a16", "llm_int8"])
def test_eight_bit_is_the_loaded_layers_own(int8, tmp_path):
    folder = save_battery_model("llama", tmp_path)
    config = ModelConfig(path=str(folder), bits=8, dtype="bfloat16", int8_compute=int8)
    real = load_base(config, resolve_model(str(folder)), choices=Choices())
    ours = _ours("llama", 8, {}, "bfloat16", int8)
    stored = _stored(folder)
    seen = 0
    for path, module in real.named_modules():
        kind = type(module).__name__
        if kind == "Int8Linear":
            theirs = module.dequantize()
        elif kind == "Linear8bitLt":
            theirs = module.weight.data.float() * (module.weight.SCB / 127).unsqueeze(1)
        else:
            continue
        made = ours(f"{path}.weight", stored[f"{path}.weight"])
        assert torch.equal(made, theirs.bfloat16()), path
        seen += 1
    assert seen == 14


def test_sixteen_bit_is_a_cast_and_says_whether_it_changes():
    ours = _ours("llama", 16, {}, "bfloat16")
    value = torch.randn(4, 4)
    assert torch.equal(ours("model.layers.0.self_attn.q_proj.weight", value), value.bfloat16())
    assert ours.changes("model.norm.weight", torch.float32)
    assert not ours.changes("model.norm.weight", torch.bfloat16)
    assert _ours("llama", 4, NF4, "bfloat16").changes(
        "model.layers.0.self_attn.q_proj.weight", torch.bfloat16
    )
    assert not _ours("llama", 4, NF4, "bfloat16").changes("lm_head.weight", torch.bfloat16)
    assert "nf4, double" in _ours("llama", 4, NF4, "bfloat16").label


def test_a_users_skip_list_and_kept_float32_hold():
    skip = {"llm_int8_skip_modules": ["q_proj"], **NF4}
    ours = _ours("llama", 4, skip, "bfloat16")
    assert not ours.changes("model.layers.0.self_attn.q_proj.weight", torch.bfloat16)
    assert ours.changes("lm_head.weight", torch.bfloat16)
    kept = _ours("glm4_moe", 16, {}, "bfloat16")
    value = torch.randn(4)
    assert kept("model.layers.1.mlp.gate.e_score_correction_bias", value) is value
