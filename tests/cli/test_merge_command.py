"""`glasstune merge` on the command line: exit codes, output, record."""

from __future__ import annotations

import json
import sys
import types

import pytest
from merging import adapted, load_plain, method_options, save_peft
from tiny import save_tiny_model

from glasstune.cli import main as cli


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    return save_peft(adapted(base, method_options("llama", "lora")), base.parent / "adapter")


def _run(*words):
    return cli.run(["merge", *map(str, words)])


def test_done_is_0_with_text_and_record(adapter, base, tmp_path, capsys):
    record = tmp_path / "record.json"
    assert _run(adapter, "--output", tmp_path / "out", "--json", record) == 0
    out, err = capsys.readouterr()
    assert "certificate: passed, merge_kl_mean" in out
    assert "14 tensors changed, 7 copied" in out
    assert "llama.cpp  accepts it" in out
    assert "warning: --dtype: the base is stored as float32" in err
    content = json.loads(record.read_text())
    assert content == json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert content["passed"] is True
    load_plain(tmp_path / "out")


def test_data_goes_to_stdout_alone(adapter, tmp_path, capsys):
    assert _run(adapter, "--output", tmp_path / "out", "--no-certificate", "--json", "-") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["passed"] is None
    assert "not measured" in err


def test_a_refused_certificate_is_1(adapter, tmp_path, capsys, monkeypatch):
    from glasstune.adapters.changes import LowRank

    monkeypatch.setattr(LowRank, "apply", lambda self, weight: weight)
    monkeypatch.setattr(LowRank, "rows", lambda self, start, stop: self)
    assert _run(adapter, "--output", tmp_path / "out", "--json", tmp_path / "r.json") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err
    assert "the output was not put in place" in err
    assert json.loads((tmp_path / "r.json").read_text())["error"]["code"] == "certificate_failed"
    assert "--dtype float32" in err
    assert _run(adapter, "--output", tmp_path / "out", "--dtype", "float32") == 1
    assert "--dtype" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.certificate.json").read_text())["passed"] is False
    assert _run(adapter, "--output", tmp_path / "out", "--max-kl", "1000") == 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--dtype", "int4"], "--dtype"),
        (["--onto", "both"], "--onto"),
        (["--onto", "training"], "lies in none"),
        (["--gguf", "q4_0"], "f16, q8_0"),
        (["--base", "/no/such/base"], "/no/such/base"),
        (["--checkpoint", "best"], "only a run folder has checkpoints"),
    ],
)
def test_wrong_input_is_2_with_one_message(adapter, tmp_path, capsys, words, found):
    assert _run(adapter, "--output", tmp_path / "out", *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert found in err
    assert list(tmp_path.iterdir()) == []


def test_the_output_is_needed_and_kept(adapter, tmp_path, capsys):
    assert _run(adapter) == 2
    assert "--output" in capsys.readouterr().err
    assert _run(adapter, "--output", tmp_path / "out", "--no-certificate") == 0
    assert _run(adapter, "--output", tmp_path / "out", "--no-certificate") == 2
    assert "--force" in capsys.readouterr().err
    assert _run(adapter, "--output", tmp_path / "out", "--no-certificate", "--force") == 0


def test_gguf_is_written_into_the_folder_before_it_is_put_in_place(
    adapter, tmp_path, capsys, monkeypatch
):
    seen = []

    def write_gguf(folder, kinds, progress):
        assert (folder / "model.safetensors").is_file()
        assert not (tmp_path / "out").exists()
        seen.append(list(kinds))
        files = [folder / f"model-{kind}.gguf" for kind in kinds]
        for file in files:
            file.write_bytes(b"GGUF")
        return files

    module = types.ModuleType("glasstune.export.gguf")
    module.write_gguf = write_gguf
    monkeypatch.setitem(sys.modules, "glasstune.export.gguf", module)
    assert _run(adapter, "--output", tmp_path / "out", "--gguf", "f16, q8_0") == 0
    assert seen == [["f16", "q8_0"]]
    record = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert {"model-f16.gguf", "model-q8_0.gguf"} <= set(record["files"])
    assert (tmp_path / "out" / "model-f16.gguf").read_bytes() == b"GGUF"
