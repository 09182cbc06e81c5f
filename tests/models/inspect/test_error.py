"""Quantisation error against real loads at 8 and 4 bit, which bitsandbytes itself expands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from families import family_config
from runs import QuietProgress
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from glasstune.core.errors import InputError
from glasstune.core.inspection import ErrorReport, LayerError
from glasstune.models.inspect import error as error_module
from glasstune.models.inspect.error import quantization_error
from glasstune.models.inspect.source import open_source

OPTIONS: dict[str, dict[str, Any]] = {
    "8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4_double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}

Truth = dict[str, dict[str, Any]]
"""Path to `shape`, `weight` (norm), and by precision the norm of what moved and the worst row."""


def real_loads(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Truth:
    """Loads a folder at 16 bit and at each precision, and compares in float64."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    truth: Truth = {}
    for key, options in OPTIONS.items():
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(**options),
        )
        for path, module in loaded.named_modules():
            if not isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
                continue
            state = module.state if key == "8" else None
            stored = dequantize_bnb_weight(module.weight, state).detach().double()
            original = plain.get_submodule(path)
            weight = original.weight.detach().double()
            weight = weight.T if isinstance(original, Conv1D) else weight
            entry = truth.setdefault(
                path, {"shape": list(weight.shape), "weight": float(weight.norm())}
            )
            moved = stored - weight
            entry[key] = float(moved.norm())
            entry[f"{key} row"] = float((moved.norm(dim=1) / weight.norm(dim=1)).max())
    return truth


def leaves_of(truth: Truth) -> list[tuple[str, list[int]]]:
    return [(path, entry["shape"]) for path, entry in truth.items()]


def by_path(report: ErrorReport) -> dict[str, LayerError]:
    return {layer.path: layer for layer in report.layers}


def codes(report: ErrorReport) -> set[str]:
    return {finding.code for finding in report.findings} - {"weights_read"}


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-6)


def linear_leaves(model: torch.nn.Module) -> list[tuple[str, list[int]]]:
    return [
        (path, [module.out_features, module.in_features])
        for path, module in model.named_modules()
        if type(module) is torch.nn.Linear and "lm_head" not in path
    ]


def save_random(model: torch.nn.Module, folder: Path, **options: Any) -> Path:
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folder, **options)
    return folder


def save_llama(folder: Path) -> Path:
    """float32, in several shards."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    return save_random(model, folder, max_shard_size="150KB")


def save_gpt2(folder: Path) -> Path:
    """bfloat16; its matrices are `Conv1D`, [in, out]."""
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2"), dtype=torch.bfloat16)
    return save_random(model, folder)


def save_bare_bloom(folder: Path) -> Path:
    """float16 and without the head: keys lack `transformer.`."""
    model = AutoModelForCausalLM.from_config(tiny_config("bloom"), dtype=torch.float16)
    save_random(model.transformer, folder)
    assert "h.0.self_attention.dense.weight" in load_file(folder / "model.safetensors")
    return folder


def save_mixtral(folder: Path) -> Path:
    """Old names: experts one by one, `block_sparse_moe`."""
    config = family_config("mixtral", hidden_size=64, intermediate_size=128, head_dim=16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_random(model, folder)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert name in load_file(folder / "model.safetensors")
    return folder


def save_hrm(folder: Path) -> Path:
    """Gate, query, key and value are one tensor in the file and four layers in the model."""
    config = AutoConfig.for_model(
        "hrm_text", vocab_size=96, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=4, num_hidden_layers=2, num_layers_per_stack=1,
        max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_random(model, folder)
    name = "model.H_module.layers.0.attn.gqkv_proj.weight"
    assert name in load_file(folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("save", "found"),
    [
        (save_llama, {"rounded_first"}),
        (save_gpt2, set()),
        (save_bare_bloom, {"rounded_first"}),
        (save_mixtral, set()),
        (save_hrm, set()),
    ],
)
def test_equals_a_real_load(save: Callable[[Path], Path], found: set[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save(tmp_path / "model")
    truth = real_loads(folder)
    report = quantization_error(open_source(str(folder)), leaves_of(truth))
    layers = by_path(report)
    assert len(report.layers) == len(truth) >= 8
    for path, entry in truth.items():
        assert layers[path].shape == entry["shape"]
        for key in OPTIONS:
            assert layers[path].errors[key] == near(entry[key] / entry["weight"]), (path, key)
            assert layers[path].worst_row[key] == near(entry[f"{key} row"]), (path, key)
    weights = math.hypot(*(entry["weight"] for entry in truth.values()))
    for key in OPTIONS:
        moved = math.hypot(*(entry[key] for entry in truth.values()))
        assert report.mean[key] == near(moved / weights)
    order = [layer.errors["nf4"] for layer in report.layers]
    assert order == sorted(order, reverse=True)
    assert codes(report) == found
    assert report.source == str(folder)


def test_a_load_at_float32_is_measured_at_float32(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    truth = real_loads(folder, torch.float32)
    report = quantization_error(open_source(str(folder)), leaves_of(truth), dtype="float32")
    for layer in report.layers:
        entry = truth[layer.path]
        for key in OPTIONS:
            assert layer.errors[key] == near(entry[key] / entry["weight"]), (layer.path, key)
    assert codes(report) == set()


def expanded_by_table(weight: torch.Tensor, kind: str, nested: bool) -> torch.Tensor:
    """The whole tensor through bitsandbytes, its codes looked up in its own table by hand."""
    every = torch.arange(16, dtype=torch.uint8)
    one = functional.QuantState(
        absmax=torch.ones(1), shape=(1, 32), dtype=torch.float32, blocksize=64, quant_type=kind
    )
    table = functional.dequantize_4bit(((every << 4) | every).reshape(-1, 1), one).reshape(-1)[::2]
    packed, state = functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested, blocksize=64
    )
    scale = state.absmax
    if nested:
        scale = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    flat = packed.reshape(-1)
    index = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1).long()[: weight.numel()]
    values = table[index] * scale.repeat_interleave(64)[: weight.numel()]
    return values.to(weight.dtype).reshape(weight.shape)


@pytest.mark.parametrize(
    ("out", "width"),
    [(256, 64), (301, 96), (200, 66), (77, 33), (1, 4096), (64, 1), (1, 1), (5, 3), (130, 70)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_give_the_whole_tensors_result(
    out: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(out)
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(width, out, dtype=dtype)})
    weight = module["a"].weight.detach()
    leaves = [("a", [out, width])]
    name = str(dtype).removeprefix("torch.")
    whole = quantization_error(open_source(module), leaves, dtype=name).layers[0]
    monkeypatch.setattr(error_module, "_CHUNK", 1)
    parts = quantization_error(open_source(module), leaves, dtype=name).layers[0]
    norm = weight.double().norm()
    # Differences are taken in float32: of bfloat16 values exact, of float32 values rounded.
    exact = 1e-12 if dtype == torch.bfloat16 else 1e-8
    for key in ("nf4", "fp4", "nf4_double"):
        expanded = expanded_by_table(weight, key[:3], key.endswith("double"))
        truth = float((expanded.double() - weight.double()).norm() / norm)
        assert parts.errors[key] == pytest.approx(truth, rel=exact), key
        assert whole.errors[key] == pytest.approx(truth, rel=exact), key
    stored, scale, _ = functional.int8_vectorwise_quant(weight.half())
    truth = float(((stored.double() * scale.double()[:, None] / 127) - weight).norm() / norm)
    assert parts.errors["8"] == pytest.approx(truth, rel=1e-4)  # theirs expands in float32
    assert parts.errors["8"] == pytest.approx(whole.errors["8"], rel=1e-12)


def test_a_layer_with_planted_outliers_comes_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    folder = save_random(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][:, ::64] = 4.0  # one weight of each block is far above the rest
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = quantization_error(open_source(str(folder)), linear_leaves(model))
    first, second = report.layers[:2]
    assert first.path == name
    for key in OPTIONS:
        assert first.errors[key] > 1.3 * second.errors[key]


def test_weights_beyond_float16_are_an_int8_overflow() -> None:
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in "ab"})
    module["b"].weight.data[5, 3] = 1e5
    report = quantization_error(open_source(module), [(name, [64, 64]) for name in "ab"])
    layers = by_path(report)
    assert layers["b"].errors["8"] == layers["b"].worst_row["8"] == report.mean["8"] == math.inf
    assert math.isfinite(layers["a"].errors["8"])
    assert math.isfinite(report.mean["nf4"])
    finding = next(finding for finding in report.findings if finding.code == "int8_overflow")
    assert (finding.where, finding.severity) == ("b", "error")
    assert "1 weights of b.weight are beyond 65,504" in finding.message


def test_nan_is_named_and_counted_and_zero_is_no_error(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    folder = save_random(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    bad, zero = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
    tensors[f"{bad}.weight"].view(-1)[[0, 70, 4095]] = torch.tensor([math.nan, math.inf, -math.inf])
    tensors[f"{zero}.weight"].zero_()
    tensors["model.layers.1.self_attn.o_proj.weight"][3] = 0  # a row of zeros
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    leaves = linear_leaves(model)
    report = quantization_error(open_source(str(folder)), leaves)
    layers = by_path(report)
    assert set(layers) == {path for path, _ in leaves} - {bad}
    assert layers[zero].errors == dict.fromkeys(OPTIONS, 0.0) == layers[zero].worst_row
    assert all(math.isfinite(value) for value in report.mean.values())
    assert all(math.isfinite(v) for layer in report.layers for v in layer.worst_row.values())
    finding = next(finding for finding in report.findings if finding.code == "bad_weights")
    assert finding.severity == "error"
    assert finding.where == bad
    assert f"{bad}.weight holds 3 NaN or Inf of 4,096 weights" in finding.message


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
    with pytest.raises(InputError) as live:
        quantization_error(open_source(loaded), leaves)
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


@pytest.mark.parametrize("width", [16, 32, 48, 96])
def test_rows_that_bitsandbytes_misreads_on_this_cpu_are_named(width: int) -> None:
    """With AVX-512 its kernel takes scales of other blocks for such rows; CUDA does not."""
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(width, 64, dtype=torch.bfloat16)})
    weight = module["a"].weight.detach()
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    wrong = not torch.equal(theirs, expanded_by_table(weight, "nf4", False))
    report = quantization_error(open_source(module), [("a", [64, width])])
    assert ("cpu_4bit_misread" in codes(report)) == wrong
    assert report.layers[0].errors["nf4"] < 0.11


def test_progress_is_told_in_megabytes(tmp_path: Path) -> None:
    class Told(QuietProgress):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def start(self, task: str, total: int | None, unit: str) -> None:
            self.calls.append(("start", total, unit))

        def advance(self, task: str, amount: int = 1, **fields: float | str) -> None:
            self.calls.append(("advance", amount, fields))

        def finish(self, task: str) -> None:
            self.calls.append("finish")

    module = torch.nn.ModuleDict({name: torch.nn.Linear(1024, 1024) for name in "ab"})
    told = Told()
    quantization_error(open_source(module), [(n, [1024, 1024]) for n in "ab"], progress=told)
    assert told.calls[0] == ("start", 9, "MB")
    assert told.calls[-1] == "finish"
    moves = [call for call in told.calls if call[0] == "advance"]
    assert len(moves) == 8  # four chunks a layer
    assert sum(move[1] for move in moves) == 8
    assert all(move[2]["rate"].endswith("MB/s") for move in moves)
    assert {move[2]["layer"] for move in moves} == {"a", "b"}


def test_nothing_to_quantise_is_an_empty_report() -> None:
    report = quantization_error(open_source(torch.nn.ModuleDict()), [])
    assert (report.layers, report.mean) == ([], {})


def test_a_config_file_stands_for_the_weights_beside_it(tmp_path: Path) -> None:
    source = open_source(str(save_tiny_model(tmp_path / "tiny") / "config.json"))
    report = quantization_error(source, [("model.layers.0.mlp.up_proj", [128, 64])])
    assert len(report.layers) == 1
