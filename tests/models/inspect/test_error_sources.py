"""Where quantisation errors read their weights: files of every kind, a cache, a live module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quant_errors import (
    by_path,
    codes,
    expanded_by_table,
    leaves_of,
    linear_leaves,
    near,
    real_loads,
    save_gpt2,
    save_llama,
    save_random,
)
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from glasstune.core.errors import InputError
from glasstune.models.inspect.error import quantization_error
from glasstune.models.inspect.source import open_source


def test_a_weight_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    folder = save_random(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    leaves = linear_leaves(model)
    report = quantization_error(open_source(str(folder)), leaves)
    assert len(report.layers) == len(leaves) - 2
    found = {finding.code: finding for finding in report.findings}
    assert "model.layers.0.mlp.up_proj" in found["weight_not_found"].message
    assert "shape [3, 64]" in found["weight_shape"].message
    assert "[128, 64]" in found["weight_shape"].message
    assert {found["weight_not_found"].severity, found["weight_shape"].severity} == {"error"}


def test_a_tied_head_is_read_where_it_is_stored(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=True))
    folder = save_random(model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    report = quantization_error(open_source(str(folder)), [("lm_head", [512, 64])])
    weight = model.lm_head.weight.detach().bfloat16()
    expanded = expanded_by_table(weight, "nf4", False).double()
    truth = float((expanded - weight.double()).norm() / weight.double().norm())
    assert report.layers[0].errors["nf4"] == near(truth)


def test_shards_without_an_index_and_a_shard_that_is_missing(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    leaves = linear_leaves(AutoModelForCausalLM.from_config(tiny_config("llama")))
    with_index = quantization_error(open_source(str(folder)), leaves)
    content = index.read_text()
    index.unlink()
    # The original format beside it, an adapter: not shards.
    save_file({"x": torch.ones(2)}, folder / "consolidated.safetensors")
    without = quantization_error(open_source(str(folder)), leaves)
    assert without.layers == with_index.layers
    assert codes(without) == {"rounded_first", "no_index"}
    index.write_text(content)
    shard = folder / sorted(set(json.loads(content)["weight_map"].values()))[0]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name) as missing:
        quantization_error(open_source(str(folder)), leaves)
    assert missing.value.code == "no_weights"
    index.write_text("{}")
    with pytest.raises(InputError) as bad:
        quantization_error(open_source(str(folder)), leaves)
    assert bad.value.code == "bad_index"


def test_bin_files_are_read_whole_and_say_so(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    leaves = linear_leaves(model)
    folder = save_random(model, tmp_path / "model")
    truth = quantization_error(open_source(str(folder)), leaves)
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), file)
    report = quantization_error(open_source(str(folder)), leaves)
    assert report.layers == truth.layers
    assert codes(report) == {"rounded_first", "whole_files_read"}
    with pytest.raises(InputError, match="read whole") as refused:
        quantization_error(open_source(str(folder)), leaves, memory_bytes=2**18)
    assert refused.value.code == "memory_budget"
    torch.save({"x": Path("code")}, file)  # needs code from the file
    with pytest.raises(InputError) as unsafe:
        quantization_error(open_source(str(folder)), leaves)
    assert unsafe.value.code == "bad_weights"


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    leaves = linear_leaves(AutoModelForCausalLM.from_config(tiny_config("llama")))
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    with pytest.raises(InputError, match="4 bit") as live:
        quantization_error(open_source(loaded), [])
    loaded.save_pretrained(tmp_path / "small")
    with pytest.raises(InputError) as stored:
        quantization_error(open_source(str(tmp_path / "small")), leaves)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    del config["quantization_config"]  # the header tells as well
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as header:
        quantization_error(open_source(str(tmp_path / "small")), leaves)
    assert {e.value.code for e in (live, stored, header)} == {"already_quantized"}


def test_a_live_module_is_measured_with_and_without_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = save_gpt2(tmp_path / "model")
    truth = real_loads(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    plain = quantization_error(open_source(model), leaves_of(truth))
    config = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    wrapped = get_peft_model(model, config)
    adapted = quantization_error(open_source(wrapped), leaves_of(truth))
    for report in (plain, adapted):
        layers = by_path(report)
        assert layers.keys() == truth.keys()
        for path, entry in truth.items():
            assert layers[path].errors["fp4"] == near(entry["fp4"] / entry["weight"])
    with torch.device("meta"):
        empty = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})
    with pytest.raises(InputError) as meta:
        quantization_error(open_source(empty), [("a", [4, 4])])
    assert meta.value.code == "no_weights"


def test_without_weights_it_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    leaves = [("model.layers.0.mlp.up_proj", [128, 64])]
    with pytest.raises(InputError, match="only a config") as bare:
        quantization_error(open_source(tiny_config("llama")), leaves)
    cache = tmp_path / "cache"
    snapshot = cache / "models--some--model" / "snapshots" / "abc"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    source = open_source(tiny_config("llama"))
    hub = type(source)("some/model", "hub", source.config, None, None)
    with pytest.raises(InputError, match="hf download some/model") as away:
        quantization_error(hub, leaves)
    assert {bare.value.code, away.value.code} == {"no_weights"}
    save_random(model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    report = quantization_error(hub, leaves)
    assert report.source == str(snapshot)
    assert len(report.layers) == 1


def test_a_gguf_file_is_expanded_once_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_gguf import write_tiny_gguf

    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "cache"))
    source = open_source(str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    leaves = [("model.layers.0.mlp.down_proj", [32, 64])]
    with pytest.raises(InputError) as refused:
        quantization_error(source, leaves, memory_bytes=1000)
    assert refused.value.code == "memory_budget"
    report = quantization_error(source, leaves)
    assert "gguf_expanded" in codes(report)
    weight = load_file(Path(report.source) / "model.safetensors")[f"{leaves[0][0]}.weight"]
    expanded = expanded_by_table(weight, "nf4", False).double()
    truth = float((expanded - weight.double()).norm() / weight.double().norm())
    assert report.layers[0].errors["nf4"] == near(truth)


def test_a_budget_is_kept_or_refused(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    leaves = linear_leaves(AutoModelForCausalLM.from_config(tiny_config("llama")))
    free = quantization_error(open_source(str(folder)), leaves)
    tight = quantization_error(open_source(str(folder)), leaves, memory_bytes=2**15)
    for layer, other in zip(free.layers, tight.layers, strict=True):
        assert layer.path == other.path
        assert layer.errors == pytest.approx(other.errors, rel=1e-12)
    with pytest.raises(InputError) as refused:
        quantization_error(open_source(str(folder)), leaves, memory_bytes=1000)
    assert refused.value.code == "memory_budget"
    assert refused.value.where in dict(leaves)


def test_a_config_file_stands_for_the_weights_beside_it(tmp_path: Path) -> None:
    source = open_source(str(save_tiny_model(tmp_path / "tiny") / "config.json"))
    report = quantization_error(source, [("model.layers.0.mlp.up_proj", [128, 64])])
    assert len(report.layers) == 1
