import json

import pytest
from runs import QuietProgress, tiny_run

from glasstune.cli.main import run
from glasstune.core.errors import InputError
from glasstune.workflows.data import check_data
from glasstune.workflows.train import train


def test_data_command_counts_and_shows(tiny_llama, qa_file, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {{path: {tiny_llama}}}\ndata: {{sources: [{{path: {qa_file}}}]}}\n")
    words = ["data", str(config), "data.max_length=128", "--show", "1", "--json", "-"]
    assert run(words) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["rows"] == 60
    assert set(record) == {
        "rows", "kept", "dropped", "tokens", "trained_tokens", "lengths", "by_source", "findings",
        "policies", "cut", "duplicates", "scripts", "held_out", "fingerprint", "histogram",
    }  # fmt: skip
    shown = err[err.index("row ") :]
    runs = [line.split(maxsplit=2) for line in shown.splitlines() if " + " in line]
    answers = ["".join(text.split("\u2502")) for word, _, text in runs if word == "trained"]
    assert answers
    assert all(text.startswith("It is ") for text in answers)  # what qa_file's answers say
    assert f"{qa_file}:" in shown


def test_data_command_names_a_bad_row(tiny_llama, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "q", "output": "a"}\n\nNOT JSON\n')
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {{path: {tiny_llama}}}\ndata: {{sources: [{{path: {rows}}}]}}\n")
    assert run(["data", str(config), "--json", str(tmp_path / "r.json")]) == 2
    out, err = capsys.readouterr()
    assert "error [bad_json]" in out
    assert "rows.jsonl:3" in out
    assert "Traceback" not in err
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["rows"], record["kept"], record["dropped"]) == (2, 1, {"bad_json": 1})
    assert record["findings"][0]["severity"] == "error"
    assert run(["data", str(config), "data.on_error=skip"]) == 0


def test_what_was_checked_is_what_is_trained(tiny_llama, qa_file, tmp_path):
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run", training={"max_steps": 2})
    checked = check_data(config, progress=QuietProgress())
    train(tiny_run(tiny_llama, qa_file, tmp_path / "run", training={"max_steps": 2}),
          progress=QuietProgress())  # fmt: skip
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["data_fingerprint"] == checked.record.fingerprint
    assert written["data"] == checked.record.to_dict()
    choices = {choice["name"]: choice["value"] for choice in written["choices"]}
    assert choices["data.cache.qa"] == "read"
    # A checked set that is changed afterwards is another set.
    other = tmp_path / "other.json"
    other.write_text(qa_file.read_text().replace("It is 3", "It is 4"))
    changed = check_data(tiny_run(tiny_llama, other, tmp_path / "run"), progress=QuietProgress())
    assert changed.record.fingerprint != checked.record.fingerprint


def test_errors_in_the_data_stop_before_the_model_loads(tiny_llama, tmp_path, monkeypatch):
    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("glasstune.models.load.load_base", load)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "q", "output": "a"}\n{"instruction": "q"}\n')
    config = tiny_run(tiny_llama, rows, tmp_path / "run")
    with pytest.raises(InputError) as error:
        train(config, progress=QuietProgress())
    assert error.value.where == f"{rows}:2"
    assert check_data(config).failed
    assert not (tmp_path / "run" / "adapter").exists()
