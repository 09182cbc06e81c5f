"""`glasstune inspect`: options, streams, and what a user may point it at by mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import family_config
from tiny import save_tiny_model, tiny_config

from glasstune.cli import main as cli
from glasstune.cli.inspect import names, read_bits, read_targets
from glasstune.core.errors import InputError
from glasstune.core.tensors import save_tensors

PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    """A config.json alone in its folder."""
    folder = tmp_path_factory.mktemp("config")
    tiny_config("llama").save_pretrained(folder)
    return folder / "config.json"


def test_the_tree_goes_to_stdout_and_the_record_to_a_file(config_file, tmp_path, capsys):
    record = tmp_path / "r.json"
    assert cli.run(["inspect", str(config_file), "--json", str(record)]) == 0
    out, err = capsys.readouterr()
    assert "(0-1): 2 x LlamaDecoderLayer" in out
    assert "trainable params: 32,768 || all params: 172,352 || trainable%: 19.0123" in out
    assert "Traceback" not in err
    content = json.loads(record.read_text())
    assert list(content["precisions"]) == ["16", "8", "4"]
    assert content["model"] == str(config_file)


def test_stdout_holds_only_the_record_where_json_is_stdout(config_file, capsys):
    assert cli.run(["inspect", str(config_file), "--bits", "4", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["precisions"]) == ["4"]
    assert "LlamaForCausalLM" in err


def test_options_reach_the_tree(config_file, capsys):
    words = [
        "inspect", str(config_file), "--bits", "4,16", "--r", "3",
        "--skip-modules", "o_proj,lm_head",
        "--target-modules", "q_proj,v_proj", "--quant-type", "fp4", "--no-double-quant",
        "--dtype", "float16", "--json", "-",
    ]  # fmt: skip
    assert cli.run(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["precisions"]) == ["4", "16"]
    four, sixteen = record["precisions"]["4"], record["precisions"]["16"]
    rows = {row["path"]: row for row in four["modules"]}
    at = "model.layers.0.self_attn."
    assert rows[f"{at}o_proj"]["class"] == "Linear"
    assert rows[f"{at}k_proj"]["class"] == "Linear4bit"
    assert rows[f"{at}k_proj"]["dtype"] == "fp4"
    assert rows[f"{at}q_proj"]["lora"]["r"] == 3
    assert rows[f"{at}k_proj"]["lora"] is None
    assert four["quantization"]["bnb_4bit_use_double_quant"] is False
    assert {row["dtype"] for row in sixteen["modules"] if row["parameters"]} == {"float16"}
    assert record["adapter"]["target_modules"] == ["q_proj", "v_proj"]


def test_depth_folds_the_printed_tree_only(config_file, capsys):
    assert cli.run(["inspect", str(config_file), "--depth", "1", "--bits", "16"]) == 0
    out = capsys.readouterr().out
    assert "LlamaModel(...)" in out
    assert "q_proj):" not in out


def test_the_page_is_written_and_named(config_file, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.run(["inspect", str(config_file), "--html", str(page)]) == 0
    assert str(page) in capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert "LlamaDecoderLayer" in text


def test_warnings_and_error_findings_still_end_with_0(tmp_path, capsys):
    """Findings are the result: nothing converts in Falcon, and a target hits nothing."""
    family_config("falcon").save_pretrained(tmp_path)
    words = ["inspect", str(tmp_path), "--bits", "4", "--target-modules", "dense,w_pack"]
    assert cli.run([*words, "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    severities = {
        item["code"]: item["severity"]
        for item in [*record["findings"], *record["precisions"]["4"]["findings"]]
    }
    assert severities["nothing_converted"] == "error"
    assert severities["target_not_found"] == "error"


def test_error_without_weights_says_where_to_get_them(config_file, capsys):
    assert cli.run(["inspect", str(config_file), "--error"]) == 2
    assert "weights" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "5", "16,16", "16,,4", "16;8", "4bit", "16,8,4,2"])
def test_bad_bits_are_named(config_file, text, capsys):
    assert cli.run(["inspect", str(config_file), "--bits", text]) == 2
    err = capsys.readouterr().err
    assert "--bits" in err
    assert "hint: give 16, 8 and 4" in err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], "MODEL"),
        (["x", "--r", "0"], "--r"),
        (["x", "--r", "three"], "--r"),
        (["x", "--depth", "-1"], "--depth"),
        (["x", "--html", "/nowhere/at/all.html"], "/nowhere/at"),
        (["x", "--html", "."], "is a folder"),
        (["x", "--json", "/nowhere/at/all.json"], "/nowhere/at"),
        (["x", "--target-modules", "q_proj,,v_proj"], "--target-modules"),
        (["x", "--skip-modules", ""], "--skip-modules"),
        (["x", "--bit", "4"], "--bit"),
    ],
)
def test_bad_usage_ends_before_any_work(words, found, capsys, monkeypatch):
    from glasstune.workflows import inspect as workflow

    monkeypatch.setattr(workflow, "find_target", lambda target: pytest.fail("it went to work"))
    assert cli.run(["inspect", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert found in err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--quant-type", "int4"], "nf4"),
        (["--dtype", "int3"], "float16"),
        (["--target-modules", "w_pack"], "q_proj, k_proj"),
        (["--skip-modules", "(q_proj"], "(q_proj"),
    ],
)
def test_bad_values_are_named(config_file, words, found, capsys):
    assert cli.run(["inspect", str(config_file), *words]) == 2
    err = capsys.readouterr().err
    assert found in err
    assert "Traceback" not in err


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def remote(folder: Path) -> Path:
    write(
        folder, "config.json",
        {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}},
    )  # fmt: skip
    return folder


def weights(folder: Path) -> Path:
    save_tensors({"a": torch.zeros(3)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def adapter(folder: Path, **content: object) -> Path:
    return write(folder, "adapter_config.json", content)


def broken_run(folder: Path) -> Path:
    write(folder, "run.json", {})
    return write(folder, "config.yaml", "model: 3\n").parent


def saved(folder: Path, family: str) -> Path:
    from transformers import AutoConfig

    AutoConfig.for_model(family).save_pretrained(folder)
    return folder


BAD = {
    "no architecture": (lambda f: write(f, "config.json", {"hidden_size": 64}), "model_type"),
    "unknown type": (lambda f: write(f, "config.json", {"model_type": "lama"}), "llama"),
    "remote code": (remote, "code"),
    "png": (lambda f: write(f, "config.json", PNG), "not JSON"),
    "list": (lambda f: write(f, "config.json", [1, 2]), "list"),
    "number": (lambda f: write(f, "config.json", "12"), "not JSON"),
    "empty file": (lambda f: write(f, "config.json", ""), "empty"),
    "cut JSON": (lambda f: write(f, "config.json", '{"model_type": "lla'), "JSON"),
    "yaml of another": (lambda f: write(f, "mkdocs.yaml", "site_name: x\n"), "site_name"),
    "yaml list": (lambda f: write(f, "a.yml", "- 1\n"), "a.yml"),
    "text": (lambda f: write(f, "notes.txt", "hello"), "not JSON"),
    "tokenizer": (
        lambda f: write(f, "tokenizer.json", {"version": "1", "added_tokens": [], "model": {}}),
        "tokenizer",
    ),
    "adapter config": (
        lambda f: adapter(f, peft_type="LORA", base_model_name_or_path="b"),
        "adapter",
    ),
    "weights": (weights, "weights"),
    "bad gguf": (lambda f: write(f, "m.gguf", b"GGUF" + bytes(40)), "GGUF"),
    "no gguf": (lambda f: write(f, "m.gguf", b"nope"), "GGUF"),
    "missing": (lambda f: f / "absent", "does not exist"),
    "hub offline": (lambda f: "some-owner/some-model", "some-owner/some-model"),
    "bad id": (lambda f: "not an id!", "not an id!"),
    "empty folder": (lambda f: f, "config.json"),
    "encoder": (lambda f: saved(f, "vit"), "causal"),
    "seq2seq": (lambda f: saved(f, "t5"), "causal"),
    "negative": (
        lambda f: write(f, "config.json", {"model_type": "llama", "num_hidden_layers": -3}), "-3",
    ),
    "adapter of another kind": (
        lambda f: adapter(f, peft_type="IA3", base_model_name_or_path="b").parent,
        "LoRA",
    ),
    "adapter without base": (
        lambda f: adapter(f, peft_type="LORA").parent, "base",
    ),
    "adapter of a lost base": (
        lambda f: adapter(f, peft_type="LORA", base_model_name_or_path="/gone/b").parent,
        "/gone/b",
    ),
    "broken run": (broken_run, "config.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_model_is_one_message_and_exit_2(case, tmp_path, capsys):
    make, says = BAD[case]
    folder = tmp_path / "place"
    folder.mkdir()
    record = tmp_path / "r.json"
    assert cli.run(["inspect", str(make(folder)), "--json", str(record)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert says in err
    assert "Traceback" not in err
    failed = json.loads(record.read_text())
    assert failed["ok"] is False
    assert set(failed["error"]) == {"code", "message", "where", "fix"}
    assert failed["error"]["fix"]


def test_remote_code_runs_only_where_it_is_trusted(tmp_path, capsys):
    folder = tmp_path / "m"
    save_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (folder / "code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).write_text('x')\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    assert cli.run(["inspect", str(folder)]) == 2
    assert not mark.exists()
    capsys.readouterr()
    assert cli.run(["inspect", str(folder), "--trust-remote-code", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "mine"
    assert mark.exists()


def test_a_process_of_its_own(config_file, tmp_path):
    """The installed command, from another folder, with a relative path."""
    shutil.copy(config_file, tmp_path / "config.json")
    done = subprocess.run(
        [sys.executable, "-m", "glasstune", "inspect", "config.json", "--bits", "4"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Linear4bit" in done.stdout


def test_words_are_read():
    assert read_bits(None) is None
    assert read_bits(" 8, 4") == [8, 4]
    assert read_targets(None) is None
    assert read_targets("All-Linear") == "all-linear"
    assert read_targets("q_proj, v_proj") == ["q_proj", "v_proj"]
    assert read_targets("lm_head") == ["lm_head"]
    assert read_targets(r".*\.(q|k)_proj") == r".*\.(q|k)_proj"  # PEFT matches it to whole paths
    assert names(r"a,layers\.[0,1]\.b", "--x") == ["a", r"layers\.[0,1]\.b"]
    with pytest.raises(InputError):
        names(" , ", "--x")
