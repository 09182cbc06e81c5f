"""The dry run against real loads on the CPU: every class and every byte, nothing left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from battery import ARCHITECTURES, KEPT_FLOAT, real_load, real_tree, save_battery_model
from transformers import AutoModelForCausalLM

from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.models.inspect.precision import precision_record
from glasstune.models.inspect.source import open_source
from glasstune.models.int8 import convert_to_int8
from glasstune.models.load import load_base
from glasstune.models.quiet import quiet_transformers
from glasstune.models.resolve import resolve_model

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
DOUBLE = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
SKIP = {
    **DOUBLE,
    "llm_int8_skip_modules": ["o_proj", "k_proj", "dense", "c_proj", "lm_head", "embed_out"],
}
OWN_HEAD = {"llm_int8_skip_modules": ["q_proj"]}

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "16": (16, {}),
    "8": (8, {}),
    "8-list": (8, OWN_HEAD),
    "nf4": (4, NF4),
    "nf4-double": (4, DOUBLE),
    "fp4": (4, FP4),
    "skip": (4, SKIP),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("battery")
    return {name: save_battery_model(name, root) for name in [*ARCHITECTURES, *KEPT_FLOAT]}


def assert_equal(record, model) -> None:
    truth = real_tree(model)
    planned = {row.path: (row.class_name, row.parts) for row in record.modules}
    assert list(planned) == list(truth)
    wrong = {path: (planned[path], truth[path]) for path in truth if planned[path] != truth[path]}
    assert not wrong
    total = sum(sum(parts.values()) for _, parts in truth.values())
    assert record.total_bytes == total == sum(record.bytes_by_part.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*ARCHITECTURES, *KEPT_FLOAT])
def test_every_class_and_byte_is_a_real_loads(name, way, folders):
    bits, options = WAYS[way]
    record = precision_record(open_source(str(folders[name])), bits, options)
    model = real_load(folders[name], bits, options)
    assert_equal(record, model)
    quantized = sum(
        type(part).__name__.startswith(("Linear4", "Linear8")) for part in model.modules()
    )
    # No agreement by there being nothing to agree on.
    assert (quantized > 0) == (bits != 16 and (name != "falcon" or way == "8-list"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_our_own_int8_layers_too(name, folders):
    record = precision_record(open_source(str(folders[name])), 8, int8_compute="w8a16")
    model = real_load(folders[name], 16, {})
    convert_to_int8(model, None)
    assert_equal(record, model)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gpt_neox"])
def test_our_own_int8_layers_with_a_skip_list(name, folders):
    skip = ["q_proj", "dense"]
    record = precision_record(
        open_source(str(folders[name])), 8, {"llm_int8_skip_modules": skip}, int8_compute="w8a16"
    )
    model = real_load(folders[name], 16, {})
    convert_to_int8(model, skip)
    assert_equal(record, model)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "opt", "glm4_moe", "gpt_oss"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_other_dtypes(name, dtype, bits, folders):
    """Also classes that keep some weights in float32 (glm4_moe always, gpt_oss at float16)."""
    record = precision_record(open_source(str(folders[name])), bits, dtype=dtype)
    options = DOUBLE if bits == 4 else {}
    assert_equal(record, real_load(folders[name], bits, options, getattr(torch, dtype)))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bloom", "mixtral"])
@pytest.mark.parametrize(
    ("bits", "compute"), [(16, "w8a16"), (8, "w8a16"), (8, "llm_int8"), (4, "w8a16")]
)
def test_what_load_base_loads(name, bits, compute, folders):
    """The defaults of a training run: the record is asked for without naming one option."""
    config = ModelConfig(path=str(folders[name]), bits=bits, int8_compute=compute, device="cpu")
    model = load_base(config, resolve_model(str(folders[name])), choices=Choices())
    record = precision_record(open_source(str(folders[name])), bits, int8_compute=compute)
    assert_equal(record, model)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_a_quantised_checkpoint(name, bits, folders, tmp_path):
    """Its own settings win, over our defaults and over what is asked for."""
    skip = {"llm_int8_skip_modules": ["lm_head", "q_proj", "c_attn"]}
    options = {**FP4, **skip, "bnb_4bit_compute_dtype": "bfloat16"} if bits == 4 else skip
    with quiet_transformers():
        real_load(folders[name], bits, options).save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
    source = open_source(str(tmp_path))
    assert [finding.code for finding in source.findings] == ["checkpoint_quantized"]
    assert_equal(precision_record(source, bits, DOUBLE), again)


@pytest.mark.parametrize("way", ["16", "8", "nf4", "nf4-double", "fp4"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen3_moe"])
def test_a_loaded_model_as_it_is(name, way, folders):
    bits, options = WAYS[way]
    model = real_load(folders[name], bits, options)
    assert_equal(precision_record(open_source(model), bits), model)


@pytest.mark.parametrize("way", ["8", "nf4-double", "skip", "8-list"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "falcon", "mixtral"])
def test_a_loaded_16_bit_model_at_other_precisions(name, way, folders):
    bits, options = WAYS[way]
    record = precision_record(open_source(real_load(folders[name], 16, {})), bits, options)
    assert_equal(record, real_load(folders[name], bits, options))
