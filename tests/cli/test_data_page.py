"""`glasstune data --html`: the page is that of the record and of the rows asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from glasstune.cli.main import run


@pytest.fixture
def config(tiny_llama: Path, qa_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {{path: {tiny_llama}}}\n"
        f"data: {{sources: [{{path: {qa_file}}}], max_length: 64, packing: false}}\n"
    )
    return path


def rows_of(page: Path) -> list[dict]:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="page-data">(.*?)</script>', text, re.S).group(1))["rows"]


def test_the_page_shows_as_many_rows_as_asked_for(config, tmp_path, capsys) -> None:
    page, record = tmp_path / "p.html", tmp_path / "r.json"
    words = ["data", str(config), "--show", "2", "--html", str(page), "--json", str(record)]
    assert run(words) == 0
    out, err = capsys.readouterr()
    assert f"wrote {page}" in err
    assert len(re.findall(r"^row \d+:", out, re.M)) == 2
    rows = rows_of(page)
    assert len(rows) == 2
    assert "".join(rows[0]["texts"]).count("It is ") == 1  # the answer that qa_file gives
    found = json.loads(record.read_text())
    assert f"<strong>{found['trained_tokens']:,}</strong>" in page.read_text(encoding="utf-8")


def test_without_a_number_the_page_has_twenty_and_the_terminal_none(
    config, tmp_path, capsys
) -> None:
    assert run(["data", str(config), "--html", str(tmp_path / "p.html")]) == 0
    assert len(rows_of(tmp_path / "p.html")) == 20
    assert not re.search(r"^row \d+:", capsys.readouterr().out, re.M)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    config, tmp_path, capsys
) -> None:
    assert run(["data", str(config), "--html", str(tmp_path / "no" / "p.html")]) == 2
    err = capsys.readouterr().err
    assert "needs the folder" in err
    assert "--html" in err


def test_data_that_would_be_refused_still_makes_a_page(tiny_llama, tmp_path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "q", "output": "a"}\nNOT JSON\n')
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {{path: {tiny_llama}}}\ndata: {{sources: [{{path: {bad}}}]}}\n")
    assert run(["data", str(config), "--html", str(tmp_path / "p.html")]) == 2
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "bad.jsonl:2" in text
    assert "<code>bad_json</code>" in text
