"""Quantisation error against real loads at 8 and 4 bit, which bitsandbytes itself expands."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from quant_errors import (
    OPTIONS,
    by_path,
    codes,
    expanded_by_table,
    leaves_of,
    linear_leaves,
    near,
    real_loads,
    save_bare_bloom,
    save_gpt2,
    save_hrm,
    save_llama,
    save_mixtral,
    save_random,
)
from runs import QuietProgress
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from glasstune.models.inspect import error as error_module
from glasstune.models.inspect.error import quantization_error
from glasstune.models.inspect.source import open_source


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
