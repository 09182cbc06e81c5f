"""`training.compute: fp8` through train, resume, evaluate, generate and merge."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import (
    QuietProgress,
    StopAfter,
    adapter_weights,
    last_weights,
    same_bits,
    tiny_run,
)
from safetensors.torch import load_file
from tiny import save_tiny_model

import glasstune as gt
from glasstune.cli.main import run as run_cli
from glasstune.core.batch import Document
from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.config_load import load_config
from glasstune.core.errors import InputError, StoppedBySignal
from glasstune.core.records import TrainRecord
from glasstune.data.packing import PackedSet
from glasstune.workflows import fp8_keep
from glasstune.workflows.audit import audit
from glasstune.workflows.evaluate import evaluate
from glasstune.workflows.generate import generate
from glasstune.workflows.train import train

SPOILED = ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in which one channel of a block's inner input is huge and unused."""
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path_factory.mktemp("outliers") / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        block = model.model.layers[1]
        block.post_attention_layernorm.weight[5] = 1e6
        block.mlp.gate_proj.weight[:, 5] = 0
        block.mlp.up_proj.weight[:, 5] = 0
    model.save_pretrained(folder)
    return folder


def fp8_run(model: Path, data: Path, output: Path, /, **sections: dict[str, Any]) -> Config:
    """A run with float8 products; sections override."""
    training = {"compute": "fp8", **sections.pop("training", {})}
    base = {"dtype": "bfloat16", "device": "cpu", **sections.pop("model", {})}
    return tiny_run(model, data, output, model=base, training=training, **sections)


@pytest.fixture(scope="module")
def run(
    outliers: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainRecord, list[str]]:
    """Two epochs on the model with outliers."""
    folder = tmp_path_factory.mktemp("fp8") / "run"
    said = QuietProgress()
    # The adapters of q and v alone: those of the spoiled layers would see the huge channel.
    config = fp8_run(
        outliers, qa_file, folder, adapter={"target_modules": ["q_proj", "v_proj", "o_proj"]},
        training={"num_train_epochs": 2},
    )  # fmt: skip
    record = train(config, progress=said)
    assert isinstance(record, TrainRecord)
    return folder, record, said.lines


def test_it_trains_and_says_what_float8_costs(run) -> None:
    folder, record, said = run
    assert record.eval_loss_after < record.eval_loss_before - 0.3
    report = json.loads((folder / "fp8.json").read_text())
    assert len(report["layers"]) == 14
    assert report["emulated"] is True
    assert 0 < report["tokens"] <= 512
    assert list(report["kept"]) == SPOILED
    good = [layer for layer in report["layers"] if layer["path"] not in SPOILED]
    for layer in good:
        for name in ("output_error", "row_error", "gradient_error"):
            assert 0.02 < layer[name] < 0.06, layer
    choices = {
        item["name"]: item for item in json.loads((folder / "run.json").read_text())["choices"]
    }
    assert choices["training.fp8_keep"]["value"] == SPOILED
    assert choices["training.fp8_layers"]["value"] == 12
    for path in SPOILED:
        layer = next(layer for layer in report["layers"] if layer["path"] == path)
        reason = choices[f"training.fp8_keep {path}"]["reason"]
        assert f"{layer['output_error']:.3f} off" in reason
        assert any(line == f"  kept in bfloat16: {path}: {reason}" for line in said)
    assert load_config(folder / "config.yaml").config.training.fp8_keep == SPOILED
    assert any(line.startswith("fp8: relative errors against bfloat16") for line in said)


def test_the_products_are_float8s_and_those_of_kept_layers_are_not(run, outliers, qa_file) -> None:
    folder, record, _ = run
    plain = fp8_run(outliers, qa_file, folder.parent / "bf16", training={"compute": "auto"})
    plain.adapter.target_modules = ["q_proj", "v_proj", "o_proj"]
    plain.training.max_steps = 1
    other = train(plain, progress=QuietProgress())
    assert isinstance(other, TrainRecord)
    # The same rows, adapters that are still zero: what differs is the base's rounding.
    apart = abs(record.eval_loss_before - other.eval_loss_before)
    assert 1e-4 < apart < 0.05


def test_without_outliers_nothing_is_kept(tiny_llama, qa_file, tmp_path) -> None:
    config = fp8_run(tiny_llama, qa_file, tmp_path / "run", training={"max_steps": 1})
    train(config, progress=QuietProgress())
    assert json.loads((tmp_path / "run" / "fp8.json").read_text())["kept"] == {}
    assert config.training.fp8_keep == []


@pytest.mark.parametrize("keep", [[], ["down_proj"]])
def test_names_by_the_user_are_followed_and_nothing_is_measured(
    outliers, qa_file, tmp_path, keep, monkeypatch
) -> None:
    monkeypatch.setattr(fp8_keep, "measure", None)
    config = fp8_run(
        outliers, qa_file, tmp_path / "run", training={"max_steps": 1, "fp8_keep": keep}
    )
    train(config, progress=QuietProgress())
    assert config.training.fp8_keep == keep
    assert not (tmp_path / "run" / "fp8.json").exists()
    choices = json.loads((tmp_path / "run" / "run.json").read_text())["choices"]
    layers = next(item for item in choices if item["name"] == "training.fp8_layers")
    assert layers["value"] == 14 - 2 * len(keep)


def test_a_resumed_run_gives_the_same_bits_and_measures_nothing_again(
    outliers, qa_file, tmp_path, monkeypatch
) -> None:
    training = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}
    whole = fp8_run(outliers, qa_file, tmp_path / "whole", training=training)
    train(whole, progress=QuietProgress())
    broken = fp8_run(outliers, qa_file, tmp_path / "broken", training=training)
    with pytest.raises(StoppedBySignal):
        train(broken, progress=StopAfter(2, signal.SIGTERM))
    report = (tmp_path / "broken" / "fp8.json").read_text()

    def again(*given: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(fp8_keep, "measure", again)
    resumed = fp8_run(outliers, qa_file, tmp_path / "broken", training=training)
    train(resumed, resume=True, progress=QuietProgress())
    assert resumed.training.fp8_keep == SPOILED
    assert same_bits(last_weights(tmp_path / "whole"), last_weights(tmp_path / "broken"))
    assert (tmp_path / "broken" / "fp8.json").read_text() == report


def test_other_layers_than_the_run_began_with_are_refused(run, outliers, qa_file) -> None:
    folder, _, _ = run
    config = fp8_run(
        outliers, qa_file, folder, adapter={"target_modules": ["q_proj", "v_proj", "o_proj"]},
        training={"num_train_epochs": 3, "fp8_keep": ["down_proj"]},
    )  # fmt: skip
    with pytest.raises(InputError, match="fp8_keep"):
        train(config, resume=True, progress=QuietProgress())


def test_a_report_of_an_earlier_run_does_not_outlive_it(tiny_llama, qa_file, tmp_path) -> None:
    output = tmp_path / "run"
    train(fp8_run(tiny_llama, qa_file, output, training={"max_steps": 1}), progress=QuietProgress())
    assert (output / "fp8.json").exists()
    plain = fp8_run(tiny_llama, qa_file, output, training={"max_steps": 1, "compute": "auto"})
    train(plain, overwrite=True, progress=QuietProgress())
    assert not (output / "fp8.json").exists()


@pytest.mark.parametrize(
    "adapter",
    [
        {"lora_dropout": 0.2},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"use_rslora": True, "init_lora_weights": "gaussian"},
    ],
    ids=lambda adapter: "-".join(f"{key}={value}" for key, value in adapter.items()),
)
def test_every_kind_of_adapter_learns_on_float8(qa_file, tmp_path, adapter) -> None:
    model = save_tiny_model(tmp_path / "biased", attention_bias=True)
    config = fp8_run(
        model, qa_file, tmp_path / "run", adapter=adapter,
        training={"max_steps": 6, "fp8_keep": [], "eval_steps": 6},
    )  # fmt: skip
    record = train(config, progress=QuietProgress())
    assert isinstance(record, TrainRecord)
    assert record.eval_loss_after < record.eval_loss_before - 0.05
    weights = adapter_weights(tmp_path / "run" / "adapter")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    learned = [name for name in weights if "lora_B" in name]
    assert all(bool(weights[name].any()) for name in learned)
    if "bias" in adapter:  # those of the float8 layers themselves; they start at zero
        biases = [value for name, value in weights.items() if name.endswith("_proj.bias")]
        biases += [v for name, v in weights.items() if name.endswith("base_layer.bias")]
        assert len(biases) == 8
        assert all(bool(value.any()) for value in biases)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_base_has_float8_products_where_lora_is_inside_them(
    outliers, qa_file, tmp_path, bits
) -> None:
    adapter = {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    losses = {}
    for compute in ("auto", "fp8"):
        output = tmp_path / compute
        config = fp8_run(
            outliers, qa_file, output, model={"bits": bits}, adapter=adapter,
            training={"max_steps": 4, "compute": compute, "eval_steps": 4, "learning_rate": 1e-3},
        )  # fmt: skip
        record = train(config, progress=QuietProgress())
        assert isinstance(record, TrainRecord)
        assert record.eval_loss_after < record.eval_loss_before
        losses[compute] = record.eval_loss_before
    assert config.training.fp8_keep == SPOILED
    assert 1e-4 < abs(losses["fp8"] - losses["auto"]) < 0.1
    report = json.loads((tmp_path / "fp8" / "fp8.json").read_text())
    assert [layer["path"] for layer in report["layers"] if layer["output_error"] > 0.08] == SPOILED
    speed = json.loads((tmp_path / "fp8" / "run.json").read_text())["speed"]["modules"]
    assert len(speed) == 8
    assert all(module["way"] == "wide" for module in speed)
    certificate = gt.merge(tmp_path / "fp8", tmp_path / "out", onto="training", dtype="float32")
    assert certificate.passed
    assert certificate.base["precision"].startswith(f"{bits} bit")
    assert certificate.base["precision"].endswith("rounded to float8")


@pytest.mark.parametrize(
    ("sections", "code", "where"),
    [
        ({"model": {"dtype": "float32"}}, "contradiction", "training.compute"),
        ({"model": {"bits": 8, "int8_compute": "llm_int8"}}, "contradiction", "training.compute"),
        (
            {"model": {"bits": 8, "quantization": {"llm_int8_threshold": 5.0}}},
            "contradiction", "training.compute",
        ),
        (
            {"adapter": {"init_lora_weights": "pissa"}}, "contradiction",
            "adapter.init_lora_weights",
        ),
        (
            {"adapter": {"init_lora_weights": "olora"}}, "contradiction",
            "adapter.init_lora_weights",
        ),
        (
            {
                "model": {"bits": 4},
                "losses": [{"name": "next_token"}, {"name": "kl_to_base", "weight": 0.5}],
            },
            "contradiction", "losses",
        ),
        ({"training": {"fp8_keep": ["experts"]}}, "no_such_layer", "training.fp8_keep"),
        ({"training": {"fp8_keep": ["*"]}}, "nothing_quantized", "training.fp8_keep"),
    ],
    ids=str,
)  # fmt: skip
def test_what_float8_does_not_go_with_is_refused_by_name(
    tiny_llama, qa_file, tmp_path, sections, code, where
) -> None:
    config = fp8_run(tiny_llama, qa_file, tmp_path / "run", **sections)
    with pytest.raises(InputError) as caught:
        train(config, progress=QuietProgress())
    assert (caught.value.code, caught.value.where) == (code, where)
    assert caught.value.fix
    assert not (tmp_path / "run").exists()


def test_a_refusal_exits_with_2(tiny_llama, qa_file, tmp_path, capsys) -> None:
    words = [f"model.path={tiny_llama}", f"data.sources.0.path={qa_file}"]
    words += [f"training.output_dir={tmp_path / 'run'}", "training.compute=fp8"]
    assert run_cli(["train", *words, "model.dtype=float32"]) == 2
    said = capsys.readouterr().err
    assert "training.compute is fp8, but model.dtype is float32" in said
    assert "Traceback" not in said


def test_evaluate_and_generate_work_with_the_runs_adapter(run, qa_file) -> None:
    folder, record, _ = run
    found = evaluate(str(folder), str(qa_file))
    # The adapter on the plain bfloat16 base: not the run's rounding, and nearly its loss.
    assert found.eval_loss == pytest.approx(record.eval_loss_after, abs=0.5)
    assert found.eval_loss < evaluate(str(folder), str(qa_file), no_adapter=True).eval_loss - 0.3
    answers = generate(str(folder), ["What is 3 plus 3?"], max_new_tokens=4)
    assert len(answers) == 1


def test_the_merge_passes_and_its_certificate_names_float8(run, outliers, tmp_path) -> None:
    folder, _, _ = run
    certificate = gt.merge(folder, tmp_path / "out", onto="training", dtype="float32")
    assert certificate.passed
    assert certificate.base["precision"] == "bfloat16, rounded to float8"
    assert certificate.base_kl_mean is not None
    assert certificate.base_kl_mean > 0
    # What lies there: kept layers as they were in bfloat16, others at most 4 digits a weight.
    merged, base = (load_file(at / "model.safetensors") for at in (tmp_path / "out", outliers))
    for name in ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        values = merged[name]
        digits = torch.frexp(values)[0] * 16
        rounded = bool((digits == digits.round()).all())
        assert rounded == ("down" in name)
        plain = base[name].to(torch.bfloat16).float()
        assert torch.equal(values, plain) == ("gate" in name)


@pytest.mark.parametrize(
    ("lengths", "prompt", "rows"),
    [
        ([600] * 20, 20, [128] * 4),
        ([600] * 20, 150, [256] * 2),
        ([600] * 20, 400, [512]),
        ([600] * 20, 590, [512]),  # nothing of them would be trained: the prompt is
        ([30] * 40, 20, [30] * 16),
        ([9], 3, [9]),
    ],
)
def test_the_rows_that_layers_are_measured_with(lengths, prompt, rows) -> None:
    documents = []
    for length in lengths:
        ids = np.arange(length, dtype=np.int32) + 2
        documents.append(Document(ids, np.where(np.arange(length) < prompt, -100, ids)))
    train = PackedSet.build(documents, max_length=1024, packed=True, seed=0)
    found = fp8_keep._few(train, 3)
    assert [len(document) for document in found] == rows
    assert all(document.trained_tokens for document in found)


class FirstRank:
    """A world in which another process is rank 0; it has decided."""

    writes = False

    def __init__(self, *values: Any) -> None:
        self.values = list(values)

    def broadcast(self, value: Any) -> Any:
        return self.values.pop(0)


@pytest.mark.parametrize(
    ("told", "decided"),
    [([None, {"a.b": "its output"}], ["a.b"]), ([["c"]], ["c"]), ([[]], [])],
)
def test_a_later_rank_follows_the_first_and_measures_nothing(monkeypatch, told, decided) -> None:
    monkeypatch.setattr(fp8_keep, "measure", None)
    config = fp8_run(Path("m"), Path("rows.json"), Path("out"))
    prepared: Any = SimpleNamespace(config=config, choices=Choices())
    world: Any = FirstRank(*told)
    keep = fp8_keep.Fp8Keep(None, world)
    keep.resolve(prepared, SimpleNamespace(device=torch.device("cpu")))
    assert config.training.fp8_keep == decided
    assert world.values == []
    assert keep.lines() == []


def test_a_base_in_the_hosts_memory_is_not_measured(monkeypatch) -> None:
    from glasstune.models import fp8, load

    tried = []
    monkeypatch.setattr(fp8_keep, "measure", None)
    monkeypatch.setattr(load, "choose_device", lambda *given: torch.device("cuda"))
    monkeypatch.setattr(fp8, "check_device", tried.append)
    config, choices = fp8_run(Path("m"), Path("rows.json"), Path("out")), Choices()
    prepared: Any = SimpleNamespace(config=config, choices=choices)
    fp8_keep.Fp8Keep().resolve(prepared, SimpleNamespace(device=torch.device("cpu")))
    assert config.training.fp8_keep == []
    assert tried == [torch.device("cuda")]
    noted = choices.get("training.fp8_keep")
    assert noted is not None
    assert noted.reason.startswith("not measured")


@pytest.mark.parametrize("bits", [16, 4])
def test_an_audit_looks_at_what_the_run_computes_or_says_that_it_does_not(
    outliers, qa_file, tmp_path, bits
) -> None:
    said = QuietProgress()
    config = fp8_run(outliers, qa_file, tmp_path / "run", model={"bits": bits})
    result = audit(config, progress=said)
    assert result.ok
    assert config.training.fp8_keep == SPOILED
    compute = [line for line in said.lines if line.startswith("training.compute: ")]
    assert len(compute) == 1
    assert compute[0].startswith("training.compute: " + ("fp8" if bits == 16 else "bf16"))
    states = {row.status for row in result.reports[0].parameters if "lora_B" in row.name}
    assert len(states) == 1
