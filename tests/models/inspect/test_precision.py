"""Reasons, findings, live modules: what the tree says beside its bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from battery import battery_config, real_load, real_tree, save_battery_model
from tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from glasstune.core.errors import InputError
from glasstune.models.inspect import reasons
from glasstune.models.inspect.dry_run import converts_subclasses
from glasstune.models.inspect.precision import (
    precision_record,
    rule_text,
    versions,
)
from glasstune.models.inspect.source import open_source

DOUBLE = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def record_of(name: str, bits: int = 4, options: dict[str, Any] | None = None, **more):
    return precision_record(open_source(battery_config(name)), bits, options or {}, **more)


def reason_of(record, path: str) -> tuple[str, str]:
    row = next(row for row in record.modules if row.path == path)
    return row.reason_code, row.reason


def codes(record) -> list[str]:
    return [finding.code for finding in record.findings]


def finding_of(record, code: str):
    return next(finding for finding in record.findings if finding.code == code)


# Reasons


@pytest.mark.parametrize(
    ("name", "path", "code", "words"),
    [
        ("llama", "model.layers.1.mlp.up_proj", "converted", "Linear becomes Linear4bit"),
        ("gpt2", "transformer.h.0.attn.c_attn", "converted", "Conv1D becomes Linear4bit, its wei"),
        ("llama", "lm_head", "output_head", "output head"),
        ("llama_tied", "lm_head", "tied", "model.embed_tokens.weight"),
        ("llama_tied", "model.embed_tokens", "embedding", "lm_head.weight"),
        ("llama", "model.embed_tokens", "embedding", "not a Linear"),
        ("llama", "model.norm", "norm", "normalisation"),
        ("llama", "model.rotary_emb", "no_weights", "only buffers"),
        ("llama", "model.layers.0.mlp.act_fn", "no_weights", "no weights"),
        ("falcon", "transformer.h.0.mlp.dense_h_to_4h", "linear_subclass", "FalconLinear"),
        ("qwen3_moe", "model.layers.0.mlp.experts", "experts_3d", "3 x 44 x 48"),
        ("qwen3_moe", "model.layers.0.mlp.gate", "own_parameters", "TopKRouter"),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense", "converted", "Linear4bit"),
        ("opt", "model.decoder.embed_positions", "embedding", "embedding"),
        ("gpt_oss", "model.layers.0.self_attn", "own_parameters", "GptOssAttention"),
        ("llama", "model.layers.0.mlp", "", ""),
    ],
)
def test_every_module_says_why(name, path, code, words):
    found, sentence = reason_of(record_of(name), path)
    assert found == code
    assert words in sentence


def test_no_leaf_and_no_owner_of_parameters_is_without_a_reason():
    for name in ("llama", "mixtral", "falcon", "gpt2", "gpt_oss", "glm4_moe"):
        for bits in (16, 8, 4):
            for row in record_of(name, bits).modules:
                assert bool(row.reason) == bool(row.reason_code)
                assert bool(row.reason_code) == (not row.container or row.shape is not None)
                assert row.lora is None


def test_the_last_parameters_module_stays_and_says_so():
    # Nothing follows the last layer: transformers takes it for a head.
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 5, bias=False))
    record = precision_record(open_source(model), 4)
    assert [row.class_name for row in record.modules] == ["Sequential", "Linear4bit", "Linear"]
    assert reason_of(record, "1")[0] == "last_module"


def test_the_skip_list_names_its_key():
    record = record_of("llama", 4, {"llm_int8_skip_modules": ["lm_head", "up_proj", "o_proj"]})
    assert reason_of(record, "model.layers.0.mlp.up_proj") == (
        "skip_list",
        "the skip key 'up_proj' matches",
    )
    assert reason_of(record, "lm_head")[1] == "the skip key 'lm_head' matches"
    assert reason_of(record, "model.layers.0.mlp.gate_proj")[0] == "converted"
    assert "head_quantized" not in codes(record)


def test_what_its_class_keeps_in_float32_stays():
    """A Linear layer on `_keep_in_fp32_modules` is on the skip list of every conversion."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model._keep_in_fp32_modules = {"up_proj"}
    record = precision_record(open_source(model), 8)
    assert reason_of(record, "model.layers.0.mlp.up_proj")[0] == "kept_float32"


def test_a_convolution_and_a_bare_layer():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 2), "linear": nn.Linear(4, 4), "x": nn.ReLU()})
    record = precision_record(open_source(model), 8)
    assert reason_of(record, "conv")[0] == "convolution"
    assert reason_of(record, "linear")[0] == "converted"
    bare = precision_record(open_source(nn.Linear(4, 6)), 8)
    assert [(row.path, row.class_name, row.bytes) for row in bare.modules] == [
        ("", "Linear8bitLt", 24 + 4 * 6 + 4 * 6)
    ]


def test_the_rule_is_found_by_trying(monkeypatch):
    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    record = precision_record(open_source(model), 4)
    assert not converts_subclasses()
    assert [row.class_name for row in record.modules[1:3]] == ["Other", "Linear4bit"]
    assert "exactly nn.Linear and Conv1D" in rule_text()
    assert versions()["transformers"] in rule_text()
    assert set(versions()) == {"transformers", "bitsandbytes", "peft", "torch"}
    monkeypatch.setattr(reasons, "converts_subclasses", lambda: True)
    assert "its subclasses" in rule_text()


def test_the_probe_sees_a_rule_by_isinstance(monkeypatch):
    """transformers 4.57 converted subclasses too."""
    import transformers.integrations.bitsandbytes as integration

    def by_isinstance(model, modules_to_not_convert, quantization_config):
        for name, part in list(model.named_children()):
            if isinstance(part, nn.Linear):
                setattr(model, name, nn.Identity())
        return model

    converts_subclasses.cache_clear()
    monkeypatch.setattr(integration, "replace_with_bnb_linear", by_isinstance)
    try:
        assert converts_subclasses()
    finally:
        converts_subclasses.cache_clear()


# Bytes beside storage


def test_what_a_pass_expands_to():
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        for bits, compute in ((4, "llm_int8"), (8, "llm_int8"), (8, "w8a16")):
            record = record_of("llama", bits, dtype=dtype, int8_compute=compute)
            largest = 48 * 71 * size
            assert record.largest_transient_bytes == largest
            for row in record.modules:
                converted = row.reason_code == "converted"
                expected = row.shape[0] * row.shape[1] * size if converted else 0
                assert row.transient_bytes == expected
    assert record_of("llama", 16).largest_transient_bytes == 0
    given = record_of("llama", 4, {"bnb_4bit_compute_dtype": "float32"})
    assert given.largest_transient_bytes == 48 * 71 * 4


def test_weights_that_llm_int8_keeps_in_16_bit(tmp_path):
    folder = save_battery_model("llama", tmp_path)
    options = {"llm_int8_has_fp16_weight": True}
    record = record_of("llama", 8, options)
    model = real_load(folder, 8, options)
    truth = real_tree(model)
    assert {row.path: (row.class_name, row.parts) for row in record.modules} == truth
    assert record.kept_share == 1.0


def test_options_of_another_precision_are_left_out_and_wrong_ones_refused():
    options = {**DOUBLE, "llm_int8_threshold": 4.0, "llm_int8_skip_modules": ["lm_head"]}
    by_bits = {bits: record_of("llama", bits, options).quantization for bits in (16, 8, 4)}
    assert by_bits[16] == {}
    assert by_bits[8] == {
        "load_in_8bit": True,
        "llm_int8_threshold": 4.0,
        "llm_int8_skip_modules": ["lm_head"],
    }
    assert by_bits[4]["bnb_4bit_quant_type"] == "nf4"
    assert "llm_int8_threshold" not in by_bits[4]
    for wrong, code in (
        ({"bnb_4bit_quant_typ": "nf4"}, "unknown_key"),
        ({"bnb_4bit_quant_type": "int4"}, "bad_value"),
        ({"llm_int8_skip_modules": ["("]}, "bad_value"),
        ({"llm_int8_skip_modules": "lm_head"}, "bad_value"),
        ({"llm_int8_skip_modules": [3]}, "bad_value"),
    ):
        with pytest.raises(InputError) as caught:
            record_of("llama", 4, wrong)
        assert caught.value.code == code
    for more in ({"dtype": "float8"}, {"bits": 5}):
        with pytest.raises(InputError):
            record_of("llama", **more)


def test_a_threshold_chooses_llm_int8_over_our_own_layers():
    plain = record_of("llama", 8, int8_compute="w8a16")
    assert plain.label == "int8, w8a16"
    assert plain.quantization == {"int8_compute": "w8a16"}
    record = record_of("llama", 8, {"llm_int8_threshold": 6.0}, int8_compute="w8a16")
    assert record.label == "LLM.int8"


# Findings


def test_nothing_converted():
    finding = finding_of(record_of("falcon", 4), "nothing_converted")
    assert finding.severity == "error"
    assert "8 FalconLinear" in finding.message
    record = record_of("llama", 4, {"llm_int8_skip_modules": ["proj", "lm_head"]})
    # Seven layers in each of two blocks, and the head.
    assert "holds 15 layers" in finding_of(record, "nothing_converted").message
    assert record_of("falcon", 16).findings == []


def test_the_share_that_stays():
    few = finding_of(record_of("llama", 4), "kept_at_16bit")
    much = finding_of(record_of("mixtral", 4), "kept_at_16bit")
    assert (few.severity, much.severity) == ("info", "warning")
    # By hand: embedding, head, norms, biases of attention against everything.
    d, v, inner, head, heads, kv = 48, 101, 71, 10, 4, 2
    attention = d * head * (heads + 2 * kv) + heads * head * d
    biases = head * (heads + 2 * kv) + d
    kept = 2 * v * d + 2 * (2 * d + biases) + d
    total = kept + 2 * (attention + 3 * d * inner)
    record = record_of("llama", 4)
    assert record.kept_parameters == kept
    assert record.kept_share == pytest.approx(kept / total)
    assert f"{kept / total:.1%} of parameters ({kept:,})" in few.message
    assert "experts" in much.message


def test_the_head_is_quantised_by_a_list_of_ones_own():
    options = {"llm_int8_skip_modules": ["q_proj"]}
    for bits, compute in ((4, "llm_int8"), (8, "llm_int8"), (8, "w8a16")):
        record = record_of("llama", bits, options, int8_compute=compute)
        finding = finding_of(record, "head_quantized")
        assert (finding.where, finding.severity) == ("lm_head", "warning")
        assert "tied_head_raises" not in codes(record)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_tied_head_that_raises_does_raise(bits, tmp_path):
    options = {"llm_int8_skip_modules": ["q_proj"]}
    record = record_of("llama_tied", bits, options)
    finding = finding_of(record, "tied_head_raises")
    assert (finding.where, finding.severity) == ("lm_head", "error")
    assert reason_of(record, "lm_head")[0] == "converted_tied"
    model = real_load(save_battery_model("llama_tied", tmp_path), bits, options)
    with pytest.raises((AttributeError, AssertionError, RuntimeError, TypeError)):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    # Our own layers give the head a weight of its own; and with the head on the list all is well.
    assert "tied_head_raises" not in codes(
        record_of("llama_tied", 8, options, int8_compute="w8a16")
    )
    assert "tied_head_raises" not in codes(
        record_of("llama_tied", bits, {"llm_int8_skip_modules": ["q_proj", "lm_head"]})
    )


def test_a_skip_key_that_hits_more_than_meant():
    record = record_of("llama", 4, {"llm_int8_skip_modules": ["proj", "lm_head"]})
    finding = finding_of(record, "skip_key_broad")
    assert "7 kinds" in finding.message
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in finding.message
    exact = ["q_proj", "lm_head", "model.layers.0"]
    clean = record_of("llama", 4, {"llm_int8_skip_modules": exact})
    assert not [code for code in codes(clean) if code.startswith("skip_key")]


def test_a_skip_key_that_hits_nothing():
    record = record_of("llama", 4, {"llm_int8_skip_modules": ["q_prj", "mlp", "lm_head"]})
    found = {f.where: f for f in record.findings if f.code == "skip_key_hits_nothing"}
    assert "did you mean 'q_proj'?" in found["llm_int8_skip_modules: q_prj"].fix
    mlp = found["llm_int8_skip_modules: mlp"]
    # What it proposes does what was meant.
    pattern = mlp.fix.split("'")[1]
    fixed = record_of("llama", 4, {"llm_int8_skip_modules": [pattern, "lm_head"]})
    inside = [row for row in fixed.modules if ".mlp." in row.path and row.shape]
    assert inside
    assert {row.reason_code for row in inside} == {"skip_list"}
    assert {row.class_name for row in fixed.modules if ".self_attn." in row.path} == {"Linear4bit"}


def test_double_quantisation_that_is_larger():
    record = record_of("llama", 4)
    finding = finding_of(record, "double_quantization_larger")
    plain = record_of("llama", 4, {"bnb_4bit_use_double_quant": False})
    assert f"adds {record.total_bytes - plain.total_bytes:,} bytes" in finding.message
    assert "double_quantization_larger" not in codes(plain)
    # 130 x 70 by hand: 143 blocks; plain 4 x 143, double 143 + 4 + 4 and 1024 more of table.
    model = nn.Sequential(nn.Linear(70, 130, bias=False), nn.Linear(1, 1, bias=False))
    small = precision_record(open_source(model), 4)
    row = small.modules[1]
    assert row.bytes == 4550 + (143 + 4 + 4) + 64 + 1024
    said = finding_of(small, "double_quantization_larger").message
    assert "1 layer (1 x 0)" in said
    assert f"adds {143 + 4 + 4 + 1024 - 4 * 143} bytes" in said
    large = nn.Sequential(nn.Linear(400, 400, bias=False), nn.Linear(1, 1, bias=False))
    assert "double_quantization_larger" not in codes(precision_record(open_source(large), 4))


def test_llm_int8_pins_inputs_and_our_own_layers_do_not():
    assert finding_of(record_of("llama", 8), "int8_checkpointing").severity == "info"
    assert "int8_checkpointing" not in codes(record_of("llama", 8, int8_compute="w8a16"))
    assert "int8_checkpointing" not in codes(record_of("llama", 4))
