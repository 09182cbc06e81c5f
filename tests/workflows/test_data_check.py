import json

import numpy as np

from glasstune.cli.main import run
from glasstune.core.batch import Document
from glasstune.workflows.data import show_document


class Letters:
    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens is False
        return "".join(chr(96 + token) for token in ids)


def test_a_document_shows_what_is_trained_and_what_instead():
    document = Document(
        np.array([1, 2, 3, 4, 5], dtype=np.int32),
        np.array([9, -100, 3, 26, 5], dtype=np.int32),
        origin="d.json:4",
    )
    assert show_document(document, Letters()).splitlines() == [
        "d.json:4 · 5 tokens, 3 trained",
        "  context | 'ab'",
        "  trained | 'c'",
        "  instead | 'z'",
        "  trained | 'e'",
    ]


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
        "policies", "cut", "duplicates", "scripts", "held_out", "fingerprint",
    }  # fmt: skip
    assert "trained | " in err
    assert "It is" in err


def test_data_command_names_a_bad_row(tiny_llama, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "q", "output": "a"}\n\nNOT JSON\n')
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {{path: {tiny_llama}}}\ndata: {{sources: [{{path: {rows}}}]}}\n")
    assert run(["data", str(config)]) == 2
    err = capsys.readouterr().err
    assert "rows.jsonl:3" in err
    assert "Traceback" not in err
