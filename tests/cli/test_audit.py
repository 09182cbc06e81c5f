"""`glasstune audit` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import tiny_run

from glasstune.cli import main as cli
from glasstune.core.config_load import dump_config


@pytest.fixture
def config(tiny_llama: Path, qa_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_run(tiny_llama, qa_file, tmp_path / "run")))
    return path


def test_a_healthy_configuration_ends_with_0(config, tmp_path, capsys) -> None:
    record = tmp_path / "record.json"
    assert cli.run(["audit", str(config), "--steps", "2", "--json", str(record)]) == 0
    out, err = capsys.readouterr()
    assert "step 1: next_token" in out
    assert "Gradient audit of step 2" in out
    assert "training.recompute" in err
    found = json.loads(record.read_text())
    assert found["ok"] is True
    assert [step["step"] for step in found["steps"]] == [1, 2]
    assert not (tmp_path / "run").exists()


def test_print_lists_every_parameter_before_and_after(config, tmp_path, capsys) -> None:
    assert cli.run(["audit", str(config), "--print", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)  # stdout carries the record alone
    lines = {line.split()[0]: line for line in err.splitlines() if line.startswith("base_model.")}
    for parameter in record["parameters"]:
        line = lines[parameter["name"]]
        assert str(parameter["requires_grad"]) in line
        assert f"{parameter['value']['norm']:.3e}" in line
        after = parameter["grad_after"]
        norm = 0.0 if after is None else after["norm"]
        shown = "None" if after is None else f"{norm:.3e}" if norm else "zero"
        assert shown in line
    assert "grad before" in err
    assert "grad after" in err


def test_match_and_values_show_the_tensors(config, capsys) -> None:
    words = ["audit", str(config), "--match", "*layers.0*q_proj.lora_A*", "--values"]
    assert cli.run(words) == 0
    out = capsys.readouterr().out
    assert "value: tensor(" in out
    assert "grad before backward: None" in out
    assert "k_proj" not in out.split("Findings")[0]


def test_overrides_reach_the_configuration(config, capsys) -> None:
    words = ["losses=[{name: next_token}, {name: z_loss, weight: 0.5}]", "model.bits=4"]
    assert cli.run(["audit", str(config), *words, "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [term["name"] for term in record["terms"]] == ["next_token", "z_loss"]
    assert record["bits"] == 4


def test_a_gate_that_refuses_ends_with_1_and_the_record(config, capsys, monkeypatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: original(self, x).detach())
    assert cli.run(["audit", str(config), "--json", "-"]) == 1
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["ok"] is False
    assert sum(item["code"] == "gate_dead_tensor" for item in record["findings"]) == 12
    assert "First-step gate:" in err
    assert "Traceback" not in err


def test_html_writes_the_page(config, tmp_path, capsys) -> None:
    page = tmp_path / "page.html"
    assert cli.run(["audit", str(config), "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert "lora_A" in html
    assert "next_token" in html
    assert "wrote" in capsys.readouterr().err


def test_a_page_that_cannot_be_made_is_refused_at_once(config, tmp_path, capsys) -> None:
    assert cli.run(["audit", str(config), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "--html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["missing.yaml"], None),
        (["model.bits=4"], "no_config"),
        (["--match", "nope*"], "no_match"),
        (["--steps", "0"], "usage"),
        (["training.learning_rat=1"], "unknown_key"),
    ],
)
def test_bad_usage_is_one_message(config, words, code, capsys) -> None:
    first = [] if code in (None, "no_config") else [str(config)]
    assert cli.run(["audit", *first, *words, "--json", "-"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert code is None or error["code"] == code
    assert err.splitlines()[-2 if error["fix"] else -1].startswith("error: ")
    assert "Traceback" not in err
