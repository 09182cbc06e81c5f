"""Live modules: shown as they are, at other precisions, and never changed."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from battery import battery_config, real_load, real_tree, save_battery_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from glasstune.core.errors import InputError
from glasstune.models.inspect.dry_run import skeleton
from glasstune.models.inspect.precision import (
    precision_record,
    supported_bits,
)
from glasstune.models.inspect.source import open_source
from glasstune.models.int8 import Int8Linear, convert_to_int8

DOUBLE = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def record_of(name: str, bits: int = 4, options: dict[str, Any] | None = None, **more):
    return precision_record(open_source(battery_config(name)), bits, options or {}, **more)


def reason_of(record, path: str) -> tuple[str, str]:
    row = next(row for row in record.modules if row.path == path)
    return row.reason_code, row.reason


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "text": repr(model),
        "tensors": {name: (id(t), t.device, t.dtype) for name, t in model.named_parameters()},
        "attributes": {
            path: {
                key: (type(value), list(value) if isinstance(value, (dict, list, set)) else value)
                for key, value in part.__dict__.items()
                if not key.startswith("_") or key in ("_modules", "_parameters")
            }
            for path, part in model.named_modules()
        },
    }


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral"])
def test_a_live_model_is_never_changed(name, tmp_path):
    model = AutoModelForCausalLM.from_config(battery_config(name))
    before, config = state_of(model), model.config.to_dict()
    source = open_source(model)
    for bits in (16, 8, 4):
        precision_record(source, bits)
        view = skeleton(source, bits)
        assert all(tensor.is_meta for tensor in [*view.parameters(), *view.buffers()])
        view.config.use_cache = not view.config.use_cache
        # What a library adds to a list or a mapping of the copy stays with the copy.
        for part, original in zip(view.modules(), model.modules(), strict=True):
            shared = [
                name
                for name, value in part.__dict__.items()
                if type(value) in (dict, list, set) and value is original.__dict__.get(name)
            ]
            assert not shared
    precision_record(source, 8, int8_compute="w8a16")
    after = state_of(model)
    assert after["text"] == before["text"]
    assert after["tensors"] == before["tensors"]
    assert str(after["attributes"]) == str(before["attributes"])
    assert model.config.to_dict() == config


def test_any_module_at_other_precisions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(10, 6)
            self.again = self.first
            self.turned = Conv1D(8, 6)
            self.tied_a = nn.Linear(8, 8, bias=False)
            self.tied_b = nn.Linear(8, 8, bias=False)
            self.tied_b.weight = self.tied_a.weight
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("seen", torch.zeros(5, dtype=torch.int64), persistent=False)
            self.lock = torch.Generator()

    record = precision_record(open_source(Net()), 8)
    rows = {row.path: row for row in record.modules}
    assert "again" not in rows
    # One layer under two names: replacing it under one would part them.
    assert rows["first"].reason_code == "tied"
    assert rows["turned"].class_name == "Linear8bitLt"
    assert rows["turned"].shape == [8, 6]
    assert rows["tied_a"].reason_code == rows["tied_b"].reason_code == "tied"
    assert rows["tied_b"].tied_to == "tied_a.weight"
    assert rows[""].parts == {"weights": 12, "buffers": 40}
    assert rows[""].reason_code == "own_parameters"
    assert rows["tied_a"].reason == "tied to tied_b.weight: transformers leaves both sides"
    # first stays float32; turned: 48 + 8 scales + float32 bias; tied 256.
    assert record.total_bytes == 4 * 66 + 48 + 32 + 32 + 256 + 12 + 40
    whole = precision_record(open_source(Net()), 16)
    assert whole.label == "float32"
    assert whole.total_bytes == 4 * (60 + 6 + 48 + 8 + 64 + 3) + 40


def test_shared_storage_under_two_parameters_counts_once():
    model = nn.ModuleDict({"a": nn.Linear(5, 5, bias=False), "b": nn.Linear(5, 5, bias=False)})
    model["b"].weight.data = model["a"].weight.data
    record = precision_record(open_source(model), 16)
    assert record.total_bytes == 100
    assert record.modules[2].tied_to == "a.weight"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_module_has_one_precision(bits, tmp_path):
    # With another compute dtype bitsandbytes turns biases to it in the first forward.
    options = {**DOUBLE, "bnb_4bit_compute_dtype": "bfloat16"} if bits == 4 else {}
    model = real_load(save_battery_model("llama", tmp_path), bits, options)
    source = open_source(model)
    assert [finding.code for finding in source.findings] == ["module_quantized"]
    kept, said = supported_bits(source, (16, 8, 4))
    assert kept == [bits]
    assert [finding.code for finding in said] == ["precision_left_out"]
    assert supported_bits(source, (bits,)) == ([bits], [])
    with pytest.raises(InputError, match="already") as caught:
        precision_record(source, 12 - bits)
    assert caught.value.code == "precision_unavailable"
    record = precision_record(source, bits)
    assert reason_of(record, "model.layers.0.mlp.up_proj")[0] == "converted"
    assert record.modules[0].original_class == "LlamaForCausalLM"
    linear = next(row for row in record.modules if row.path.endswith("up_proj"))
    assert (linear.original_class, linear.shape) == ("Linear", [71, 48])
    # Counts do not halve with packing.
    assert sum(row.parameters for row in record.modules) == sum(
        row.parameters for row in record_of("llama", 16).modules
    )
    # A first forward moves LLM.int8's scales to another place; they still count.
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert precision_record(source, bits).total_bytes == record.total_bytes
    view = skeleton(source, bits)
    assert view.get_submodule("model.layers.0.mlp.up_proj").weight.shape == (71, 48)
    assert type(view.model.layers[0].mlp.up_proj) is type(model.model.layers[0].mlp.up_proj)


def test_our_own_int8_module_has_one_precision(tmp_path):
    model = real_load(save_battery_model("gpt2", tmp_path), 16, {})
    convert_to_int8(model, None)
    source = open_source(model)
    assert supported_bits(source)[0] == [8]
    record = precision_record(source, 8)
    assert {row.path: (row.class_name, row.parts) for row in record.modules} == real_tree(model)
    assert isinstance(skeleton(source, 8).transformer.h[0].mlp.c_fc, Int8Linear)


def test_every_precision_is_open_to_a_plain_source():
    source = open_source(battery_config("llama"))
    assert supported_bits(source, (4, 16, 4)) == ([4, 16], [])


@pytest.mark.parametrize("bits", [16, 4])
def test_adapters_of_peft_are_taken_off(bits, tmp_path):
    folder = save_battery_model("llama", tmp_path)
    model = real_load(folder, bits, DOUBLE)
    plain = precision_record(open_source(model), bits)
    options = peft.LoraConfig(
        r=3, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], use_dora=False
    )
    adapted = peft.get_peft_model(real_load(folder, bits, DOUBLE), options)
    source = open_source(adapted)
    assert source.config is not None
    before = repr(adapted)
    record = precision_record(source, bits)

    def without(rows):
        return [{**row.to_dict(), "trainable": None} for row in rows]

    assert without(record.modules) == without(plain.modules)
    assert record.total_bytes == plain.total_bytes
    if bits == 16:
        other = precision_record(source, 4, DOUBLE)
        truth = real_tree(real_load(folder, 4, DOUBLE))
        assert {row.path: (row.class_name, row.parts) for row in other.modules} == truth
    assert repr(adapted) == before


def test_a_prompt_encoder_leaves_the_whole_model(tmp_path):
    """It stands beside the model, so that there is no tuner to take off."""
    model = AutoModelForCausalLM.from_config(battery_config("llama"))
    plain = [(row.path, row.bytes) for row in precision_record(open_source(model), 16).modules]
    options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls a name that transformers renamed
        adapted = peft.get_peft_model(model, options)
    for bits in (16, 8):
        record = precision_record(open_source(adapted), bits)
        assert record.modules[0].class_name == "LlamaForCausalLM"
        assert record.modules[-1].path == "lm_head"
        assert bits != 16 or [(row.path, row.bytes) for row in record.modules] == plain


def test_a_module_that_others_quantised_is_shown_as_it_is():
    class HQQLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.W_q = nn.Parameter(torch.zeros(9, dtype=torch.uint8), requires_grad=False)

    source = open_source(nn.Sequential(HQQLinear(), nn.Linear(2, 2)))
    assert "HQQLinear" in source.findings[0].message
    kept, said = supported_bits(source)
    assert kept == [16]
    assert "HQQLinear" in said[0].message
    record = precision_record(source, 16)
    assert record.total_bytes == 9 + 16 + 8
