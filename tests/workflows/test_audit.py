"""`glasstune audit` as a function: the record, training's own numbers, no file of a run touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QuietProgress, events, tiny_run

from glasstune.core.config_load import dump_config
from glasstune.core.errors import InputError, RunError
from glasstune.core.files import sha256_file
from glasstune.workflows.audit import audit, find_config
from glasstune.workflows.train import train

THREE = [
    {"name": "next_token"},
    {"name": "z_loss", "weight": 0.2},
    {"name": "kl_to_base", "weight": 0.5},
]


def everything_below(folder: Path) -> dict[str, str]:
    """Every file of a tree with its hash."""
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_loss(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text("import torch\ndef mine(batch):\n    " + body + "\n")
    return f"{path}:mine"


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_two_updates_are_those_of_training(tiny_llama, qa_file, tmp_path, bits, recompute) -> None:
    """Losses and gradients of both updates equal what `train` logs; B has moved in between."""

    def config(name: str, **extra: Any) -> Any:
        return tiny_run(
            tiny_llama, qa_file, tmp_path / name, model={"bits": bits}, losses=THREE,
            adapter={"lora_dropout": 0.2},
            training={"recompute": recompute, "per_device_train_batch_size": 2, **extra},
        )  # fmt: skip

    result = audit(config("audited"), steps=2, progress=QuietProgress())
    assert not (tmp_path / "audited").exists()
    assert result.ok
    train(config("trained"), progress=QuietProgress())
    logged = events(tmp_path / "trained", "train")
    assert len(result.reports) == 2
    for report, row in zip(result.reports, logged[:2], strict=True):
        assert report.record.step == row["step"]
        # The audit adds in float32, the log in float64: two units in the last place of float32.
        values = {term.name: term.value for term in report.terms}
        assert values == pytest.approx(row["losses"], rel=2.4e-7)
        norm = sum(p.increment.norm**2 for p in report.parameters if p.increment) ** 0.5
        assert norm == pytest.approx(row["grad_norm"], rel=1e-5)
        assert report.sum_check < 1e-5
        assert report.record.engine == "grad"
    first, second = result.reports
    zero = [p.name for p in first.parameters if p.status == "zero"]
    assert len(zero) == 14
    assert all("lora_A" in name for name in zero)
    assert all(first[name].reason.code == "partner_zero" for name in zero)
    assert all(second[name].status == "ok" for name in zero)


def test_the_record_is_the_contract_s(tiny_llama, qa_file, tmp_path, quiet) -> None:
    result = audit(
        tiny_run(tiny_llama, qa_file, tmp_path / "run", losses=THREE), steps=2, progress=quiet
    )
    record = result.to_dict()
    json.dumps(record, allow_nan=False)
    assert record["ok"] is True
    assert set(record) >= {
        "step", "terms", "parameters", "layers", "conflicts", "sum_check", "findings", "steps",
    }  # fmt: skip
    assert record["step"] == 2
    assert [step["step"] for step in record["steps"]] == [1, 2]
    frozen = [p for p in record["parameters"] if p["status"] == "frozen"]
    assert len(frozen) == 21
    assert all(p["value"]["norm"] > 0 for p in frozen)
    for parameter in record["parameters"]:
        assert set(parameter) >= {
            "name", "shape", "dtype", "requires_grad", "in_optimizer", "grad_before",
            "grad_after", "status", "reason", "terms",
        }  # fmt: skip
        assert set(parameter["terms"]) == {"next_token", "z_loss", "kl_to_base"}
    assert (
        "steps"
        not in audit(tiny_run(tiny_llama, qa_file, tmp_path / "run"), progress=quiet).to_dict()
    )


def test_a_run_is_audited_as_it_is_and_left_as_it_was(tiny_llama, qa_file, tmp_path, quiet) -> None:
    output = tmp_path / "run"
    train(tiny_run(tiny_llama, qa_file, output, training={"max_steps": 3}), progress=quiet)
    before = everything_below(tmp_path)
    loaded = find_config(
        str(output), ["losses=[{name: next_token}, {name: kl_to_base, weight: 1}]"]
    )
    result = audit(loaded.config, progress=quiet)
    assert everything_below(tmp_path) == before
    report = result.reports[0]
    from safetensors.torch import load_file

    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    for parameter in report.parameters:
        if parameter.requires_grad:
            key = parameter.name.replace(".default", "")
            assert parameter.value.norm == pytest.approx(float(saved[key].norm()), rel=1e-6)
            assert parameter.status == "ok"  # A has a gradient: B is not zero any more
    assert report.record.terms[1].value > 0  # nor is the divergence


def test_a_run_without_an_adapter_yet_says_so(tiny_llama, qa_file, tmp_path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text(dump_config(tiny_run(tiny_llama, qa_file, output)))
    (output / "run.json").write_text("{}")
    loaded = find_config(str(output))
    assert "has no adapter yet" in loaded.notes[-1]
    assert loaded.config.adapter.path is None


def test_what_is_no_configuration_is_refused(tmp_path) -> None:
    with pytest.raises(InputError) as caught:
        find_config(str(tmp_path))
    assert caught.value.code == "no_run"
    with pytest.raises(InputError):
        find_config(str(tmp_path / "missing.yaml"))


def test_a_dead_tensor_refuses_with_its_reason(
    tiny_llama, qa_file, tmp_path, quiet, monkeypatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: original(self, x).detach())

    def run(**gate: Any) -> Any:
        config = tiny_run(tiny_llama, qa_file, tmp_path / "run", audit=gate)
        return audit(config, steps=3, progress=quiet)

    refused = run()
    assert not refused.ok
    assert len(refused.reports) == 1  # as training, it goes no further
    assert len(refused.gate) == 12
    assert "carries its gradient" in refused.gate[0].message
    assert refused.to_dict()["ok"] is False
    assert "First-step gate:" in refused.text()
    assert run(first_step_gate="warn").ok
    assert run(first_step_gate="off").gate == []
    assert run(gate_allow=["*.mlp.*"]).ok


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        ("return batch.hidden.sum() * float('nan'), 1", "loss term 'mine' is nan at step 1"),
        (
            "total = batch.hidden.sum()\n    return (total - total).sqrt() + total, 1",
            "not finite from term 'mine'",
        ),
    ],
)
def test_what_is_not_finite_is_named(tiny_llama, qa_file, tmp_path, quiet, body, seen) -> None:
    losses = [{"name": "next_token"}, {"name": "mine", "function": write_loss(tmp_path, body)}]
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", losses=losses, audit={"first_step_gate": "off"}
    )  # fmt: skip
    result = audit(config, steps=3, progress=quiet)
    assert not result.ok
    assert len(result.reports) == 1
    assert seen in result.bad
    assert "rows: " in result.bad
    assert "qa.json" in result.bad
    assert "the forward is finite" in result.bad
    json.dumps(result.to_dict(), allow_nan=False)
    assert "stopped: " in result.text()


def test_a_loss_function_that_fails_is_named(tiny_llama, qa_file, tmp_path, quiet) -> None:
    losses = [{"name": "mine", "function": write_loss(tmp_path, "return 1 / 0, 1")}]
    with pytest.raises(RunError, match="loss term 'mine' raised ZeroDivisionError"):
        audit(tiny_run(tiny_llama, qa_file, tmp_path / "run", losses=losses), progress=quiet)


def test_nothing_trained_is_an_error(tiny_llama, qa_file, tmp_path, quiet) -> None:
    losses = [{"name": "mine", "function": write_loss(tmp_path, "return batch.hidden.sum(), 0")}]
    with pytest.raises(RunError) as caught:
        audit(tiny_run(tiny_llama, qa_file, tmp_path / "run", losses=losses), progress=quiet)
    assert caught.value.code == "nothing_trained"


def test_match_and_values(tiny_llama, qa_file, tmp_path, quiet) -> None:
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run")
    result = audit(config, values=True, match="*layers.1*q_proj.lora_B*", progress=quiet)
    (row,) = result.reports[0].parameters
    text = result.text(full=True, values=True)
    assert row.name in text
    assert "requires_grad: True" in text
    assert f"value: {torch.zeros(64, 4)}" in text
    assert "grad before backward: None" in text
    assert "grad after backward: tensor(" in text
    with pytest.raises(InputError) as caught:
        audit(tiny_run(tiny_llama, qa_file, tmp_path / "run"), match="nope*", progress=quiet)
    assert caught.value.code == "no_match"


def test_no_more_updates_than_the_configuration_makes(tiny_llama, qa_file, tmp_path) -> None:
    progress = QuietProgress()
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run", training={"max_steps": 2})
    assert len(audit(config, steps=5, progress=progress).reports) == 2
    assert any("makes 2 updates" in line for line in progress.lines)
    with pytest.raises(InputError):
        audit(config, steps=0, progress=progress)
