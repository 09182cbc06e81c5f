"""Findings: what each kind of fault is called, where, how many, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer
from preparing import BASE, CHATML, alpaca, codes, finding, prepare
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glasstune.core.choices import Choices
from glasstune.core.errors import InputError
from glasstune.core.facts import ModelFacts
from glasstune.data.checks import RowFacts
from glasstune.data.encode import Encoded
from glasstune.data.formats import to_example
from glasstune.data.tally import Tally
from glasstune.data.template import resolve_template
from glasstune.data.texts import count_letters, mojibake
from glasstune.data.write import write_rows


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def jinja(tmp_path: Path, source: str) -> str:
    (tmp_path / "t.jinja").write_text(source)
    return str(tmp_path / "t.jinja")


def test_empty_answers_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\nq1,a1\nq2,\nq3, \n")
    found = finding(prepare(file), "empty_answer")
    assert found.message == (
        "2 rows have an empty answer: they teach the model to say nothing (also line 4)"
    )
    assert found.where == f"{file}:3"
    assert "empty_answer" not in codes(prepare(alpaca(3)))
    empty = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]
    assert "empty_answer" in codes(prepare([{"messages": empty}]))


def test_alike_rows_are_one_finding_with_the_first_places(tmp_path: Path) -> None:
    rows: list[Any] = [
        *alpaca(3),
        *[{"instruction": "q"}] * 40,
        {"instruction": "q", "output": None},
    ]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(file, stop=False)
    errors = [found for found in data.record.findings if found.severity == "error"]
    assert [(found.code, found.where) for found in errors] == [
        ("missing_key", f"{file}:4"),
        ("null_answer", f"{file}:44"),
    ]
    assert "(40 such rows; also lines 5, 6, 7, 8 and 35 more)" in errors[0].message
    assert data.record.dropped == {"missing_key": 40, "null_answer": 1}
    assert data.record.rows == 44 == data.record.kept + 41
    assert [found.severity for found in data.record.findings] == sorted(
        (found.severity for found in data.record.findings),
        key=["error", "warning", "info"].index,
    )


def test_different_faults_of_one_code_stay_apart() -> None:
    rows = [{"instruction": "q"}, {"output": "a"}, *alpaca(1)] * 2
    data = prepare(rows, stop=False)
    messages = [found.message for found in data.record.findings if found.code == "missing_key"]
    assert sorted(message.split(";")[0] for message in messages) == [
        "there is no 'instruction'",
        "there is no 'output'",
    ]


def test_nothing_left_is_a_finding_of_the_check() -> None:
    data = prepare([{"instruction": "q", "output": "a " * 90}], max_length=16, stop=False)
    assert data.train.rows == 0
    assert finding(data, "no_training_rows").severity == "error"
    assert data.record.lengths == {"p50": 0, "p95": 0, "max": 0}


def test_d11_unknown_role_names_turn_and_role() -> None:
    rows = [chat(("user", "q"), ("narrator", "a")), chat(("user", "q"), ("assistant", "a"))]
    found = finding(prepare(rows, stop=False), "unknown_role")
    assert found.where == "rows[0]"
    assert "turn 1 has the role 'narrator'" in found.message


def test_d12_truncated_answers_are_counted_in_the_record() -> None:
    rows = [{"instruction": "why?", "output": "so " * 50}] * 3 + alpaca(2)
    data = prepare(rows, max_length=24, truncation="cut")
    assert data.record.cut == 3
    assert data.record.policies == {
        "truncation": "cut", "on_error": "stop", "duplicates": "keep",
    }  # fmt: skip
    assert prepare(rows, max_length=1024).record.cut == 0


def test_t03_two_begin_tokens_are_said(tmp_path: Path) -> None:
    twice = jinja(tmp_path, "{{ bos_token }}{{ bos_token }}" + TEMPLATES["chatml"])
    once = jinja(tmp_path.parent, "{{ bos_token }}" + TEMPLATES["chatml"])
    tokenizer = chat_tokenizer("chatml")
    assert tokenizer.bos_token is not None
    data = prepare(alpaca(3), tokenizer, chat_template=twice)
    assert finding(data, "double_bos").message.startswith("3 rows start with two begin tokens")
    assert data.train.documents[0].ids[:2].tolist() == [tokenizer.bos_token_id] * 2
    assert "double_bos" not in codes(prepare(alpaca(3), tokenizer, chat_template=once))
    # A tokenizer that adds its own does not double the template's.
    adding = chat_tokenizer("llama3")
    assert "double_bos" not in codes(prepare(alpaca(3), adding))


def test_t04_template_without_markers_is_said_and_trains_all_the_same() -> None:
    data = prepare(alpaca(2))
    assert finding(data, "no_generation_markers").severity == "info"
    assert all(document.trained_tokens for document in data.train.documents)
    assert "no_generation_markers" not in codes(prepare(alpaca(2), chat_tokenizer("marked")))
    assert "no_generation_markers" not in codes(prepare([{"text": "a b"}]))


def test_t01_pad_that_is_the_end_is_said_and_the_end_is_trained() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.pad_token = tokenizer.eos_token
    data = prepare(alpaca(2), tokenizer)
    assert finding(data, "pad_is_eos").severity == "info"
    for document in data.train.documents:
        assert tokenizer.eos_token_id in document.labels
    tokenizer.pad_token = "<|im_start|>"
    assert "pad_is_eos" not in codes(prepare(alpaca(2), tokenizer))


def test_t06_an_end_that_is_not_trained_is_said(tmp_path: Path) -> None:
    # No template is known to come this far, since an open answer gets the tokenizer's end token.
    facts, tally = RowFacts.of(resolve_template(CHATML, None, {})), Tally()
    example = to_example(alpaca(1)[0], "x:1", "alpaca", {})
    end = CHATML.eos_token_id
    facts.note(tally, example, Encoded([5, 6, 7, end], [-100, 6, 7, -100]), whole=True)
    facts.note(tally, example, Encoded([5, 6, 7, end], [-100, 6, 7, end]), whole=True)
    facts.note(tally, example, Encoded([5, 6, 7], [-100, 6, 7]), whole=False)
    assert tally.notes["end_not_trained"].count == 1
    open_end = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}\n"
        "{% else %}{% generation %}{{ m.content }}{% endgeneration %}.\n{% endif %}{% endfor %}"
    )
    data = prepare(alpaca(2), chat_template=jinja(tmp_path, open_end))
    assert "end_not_trained" not in codes(data)
    assert {document.labels[-1] for document in data.train.documents} == {end}
    cut = prepare([{"instruction": "q", "output": "a " * 90}], max_length=24, truncation="cut")
    assert "end_not_trained" not in codes(cut)  # that a cut answer has none is the policy


DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
)


def test_a_system_prompt_of_the_template_is_quoted(tmp_path: Path) -> None:
    template = jinja(tmp_path, DEFAULT + TEMPLATES["chatml"])
    rows = [chat(("user", "q"), ("assistant", "a"))] * 2
    rows.append(chat(("system", "s"), ("user", "q"), ("assistant", "a")))
    found = finding(prepare(rows, chat_template=template), "default_system_prompt")
    assert "2 rows: 'Be good.'" in found.message
    assert found.severity == "info"
    own = prepare(rows[2:], chat_template=template)
    assert "default_system_prompt" not in codes(own)
    assert "Be good" not in CHATML.decode(own.train.documents[0].ids)
    for style in TEMPLATES:
        assert "default_system_prompt" not in codes(prepare(rows[:1], chat_tokenizer(style)))


def test_system_prompts_go_through_the_templates_own_slot() -> None:
    rows = [
        chat(("system", "Be brief."), ("user", "q"), ("assistant", "a")),
        {**chat(("user", "q"), ("assistant", "a")), "system": "Be brief."},
    ]
    expected = CHATML.apply_chat_template(rows[0]["messages"], tokenize=False)
    for document in prepare(rows).train.documents:
        assert CHATML.decode(document.ids) == expected


def test_duplicates_are_counted_with_their_places() -> None:
    rows = [*alpaca(4), {"instruction": "WHY 1?", "output": "because  1."}, *alpaca(3)]
    kept = prepare(rows)
    found = finding(kept, "duplicates")
    assert found.message.startswith("4 rows repeat the text of an earlier row (3 texts appear more")
    assert (found.where, found.severity, kept.record.duplicates) == ("rows[0]", "warning", 4)
    assert "rows[1], rows[2]" in found.message
    dropped = prepare(rows, duplicates="drop")
    assert finding(dropped, "duplicates").severity == "info"
    assert dropped.record.dropped == {"duplicate": 4}
    assert dropped.record.kept + 4 == dropped.record.rows == 8
    assert "duplicates" not in codes(prepare(alpaca(4)))


def test_duplicates_across_sources_and_overlap_across_sides() -> None:
    sources = [{"path": alpaca(3), "name": "a"}, {"path": alpaca(5)[2:], "name": "b"}]
    assert prepare(sources).record.duplicates == 1
    data = prepare(sources, validation=[{"path": alpaca(2), "name": "held"}])
    assert finding(data, "validation_overlap").message.startswith("2 validation rows")
    assert data.record.held_out == 2
    split = prepare(alpaca(20) * 2, validation_split=0.2)
    assert "validation_overlap" not in codes(split)  # all rows of a text are on one side


@pytest.mark.parametrize(
    ("times", "others", "said"),
    [(100, 20_000, True), (12, 900, True), (12, 2000, False), (9, 50, False)],
)
def test_a_row_that_dominates(times: int, others: int, said: bool) -> None:
    rows = [{"text": f"text {k}"} for k in range(others)]
    rows[7:7] = [{"text": "again and again"}] * times
    data = prepare(rows, BASE)
    assert ("dominant_row" in codes(data)) is said
    if said:
        found = finding(data, "dominant_row")
        assert found.where == "rows[7]"
        assert f"appears {times} times" in found.message


def test_d12_ids_beyond_the_embedding_are_one_error_even_where_errors_are_skipped() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.add_tokens(["<mine>"])
    facts = ModelFacts("llama", tokenizer.convert_tokens_to_ids("<mine>"), 4096, True, "tested")
    rows = [*alpaca(2), *[{"instruction": "a <mine> b", "output": "c"}] * 3]
    with pytest.raises(InputError) as error:
        prepare(rows, tokenizer, facts=facts, on_error="skip")
    assert error.value.code == "token_beyond_vocabulary"
    data = prepare(rows, tokenizer, facts=facts, stop=False)
    assert (
        "(3 such rows; also rows[3], rows[4])" in finding(data, "token_beyond_vocabulary").message
    )
    assert data.record.kept == 2


def test_characters_that_the_tokenizer_loses_are_said() -> None:
    words = {word: k for k, word in enumerate(["<unk>", "</s>", "why", "so"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")
    rows = [{"prompt": "why", "completion": "so"}, {"prompt": "why", "completion": "\u4e8c"}]
    found = finding(prepare(rows, tokenizer), "unknown_tokens")
    assert found.where == "rows[1]"
    assert found.message.startswith("1 row holds")
    assert "unknown_tokens" not in codes(prepare(rows[:1], tokenizer))
    meant = [{"prompt": "why <unk>", "completion": "so"}]
    assert "unknown_tokens" not in codes(prepare(meant, tokenizer))


@pytest.mark.parametrize(
    "text", ["Grüße", "déjà vu – «oui»", "naïve “quoted” text…", "Größe ½ °C ± 3", "привет", "二十",
             "Ελληνικά", "İstanbul", "ÃÂ", "Spaß« »ß", "São Paulo, NÃO", "\U0001f600"],
)  # fmt: skip
def test_right_text_is_no_mojibake_and_its_wrong_reading_is(text: str) -> None:
    assert mojibake(text) is None
    raw = text.encode("utf-8")
    # As a program with the wrong code page reads it; its five open bytes stay what they are.
    wrong = "".join(
        bytes([byte]).decode("cp1252", "replace").replace("\ufffd", chr(byte)) for byte in raw
    )
    assert mojibake(wrong) is not None


def test_mojibake_and_lost_characters_are_counted() -> None:
    rows = [
        {"instruction": "q", "output": "GrÃ¼ÃŸe"},
        {"instruction": "q", "output": "GrÃ¼ÃŸe"},
        {"instruction": "q", "output": "Gr\ufffdße"},
        *alpaca(1),
    ]
    found = finding(prepare(rows), "mojibake")
    assert found.message.startswith("the texts of 3 rows")
    assert "'Ã¼'" in found.message
    assert "mojibake" not in codes(prepare(alpaca(3)))


def test_scripts_are_shares_of_letters() -> None:
    letters: dict[str, int] = {}
    count_letters(["abc 12 \u4e8c\u4e8c", "\u0416! \u03a9 \xd7"], letters)
    assert letters == {"Latin": 3, "Han": 2, "Cyrillic": 1, "Greek": 1}
    rows = [{"instruction": "abcd", "output": "\u4e8c\u5341\u4e8c\u5341"}]
    assert prepare(rows).record.scripts == {"Han": 0.5, "Latin": 0.5}
    assert prepare([{"instruction": "1?", "output": "2"}]).record.scripts == {}


def test_real_data_of_two_languages(real_data: Path) -> None:
    big = ModelFacts("llama", 512, 65536, True, "tested")
    for name, script in (("alpaca_en_demo", "Latin"), ("alpaca_zh_demo", "Han")):
        data = prepare(real_data / f"{name}.json", facts=big, max_length=65536)
        assert next(iter(data.record.scripts)) == script
        assert data.record.scripts[script] > 0.85


def test_preference_rows_say_what_they_are_and_how_to_use_them(real_data: Path) -> None:
    path = real_data / "dpo_en_demo.json"
    with pytest.raises(InputError, match="preference pairs: each row holds a chosen and") as error:
        prepare(path)
    mapping = error.value.fix[error.value.fix.index("{") :].strip("{}")
    columns = dict(part.split(": ") for part in mapping.split(", "))
    big = ModelFacts("llama", 512, 65536, True, "tested")
    data = prepare([{"path": str(path), "columns": columns}], facts=big, max_length=65536)
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert data.record.kept + sum(data.record.dropped.values()) == len(raw)
    text = CHATML.decode(data.train.documents[0].ids)
    assert raw[0]["chosen"]["value"] in text
    assert raw[0]["conversations"][0]["value"] in text
    assert raw[0]["rejected"]["value"] not in text


@pytest.mark.parametrize(
    ("name", "raw", "code", "hint"),
    [
        ("x.csv", b"instruction;output\nq;a\n", "semicolon_csv", "commas"),
        ("x.jsonl.gz", b"\x1f\x8b\x08rest", "compressed_file", "gunzip x.jsonl.gz"),
        ("x.csv", b"\x1f\x8b\x08rest", "compressed_file", "gunzip"),
        ("x.json", b"PK\x03\x04rest", "compressed_file", "unzip"),
        ("x.json", b"\x28\xb5\x2f\xfdrest", "compressed_file", "unzstd"),
    ],
)
def test_files_of_another_kind_have_a_hint(
    tmp_path: Path, name: str, raw: bytes, code: str, hint: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError) as error:
        prepare(tmp_path / name)
    assert error.value.code == code
    assert hint in error.value.fix


def test_columns_that_json_cannot_hold_are_left_out_and_said(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    rows = [{**row, "day": datetime.date(2024, 1, 2), "score": 0.5} for row in alpaca(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    data = prepare(tmp_path / "x.parquet", keep_columns=True)
    assert [document.columns for document in data.train.documents] == [{"score": 0.5}] * 3
    assert "'day', a date" in finding(data, "column_left_out").message
    choices = Choices()
    memory = prepare(rows, keep_columns=True, choices=choices)  # they go through no JSON
    assert memory.train.documents[0].columns == {"day": datetime.date(2024, 1, 2), "score": 0.5}
    assert "column_left_out" not in codes(memory)
    choice = choices.get("data.cache.rows")
    assert choice is not None
    assert (choice.value, "in memory" in choice.reason) == ("none", True)


def test_columns_that_nothing_reads_are_said(tmp_path: Path) -> None:
    rows = [{**row, "id": k, "note": None, "tags": []} for k, row in enumerate(alpaca(5))]
    rows[2]["score"] = 0.5
    write_rows(rows, tmp_path / "x.jsonl")
    found = finding(prepare(tmp_path / "x.jsonl"), "unread_columns")
    assert (found.severity, found.where) == ("info", "x")
    assert found.message.endswith("'id' (5 rows), 'score' (1 rows)")
    assert "unread_columns" not in codes(prepare(rows, keep_columns=True))  # for loss functions
    mapped = [{"q": row["instruction"], "a": {"b": row["output"]}, "c": 1} for row in rows]
    columns = {"prompt": "{q}!", "completion": "a.b"}
    data = prepare([{"path": mapped, "columns": columns}])
    assert finding(data, "unread_columns").message.endswith("read: 'c' (5 rows)")
    arrays = [{**row, "vector": np.arange(3)} for row in alpaca(2)]
    assert finding(prepare(arrays), "unread_columns").message.endswith("'vector' (2 rows)")
    names = [{**row, f"column {k}": 1} for k, row in enumerate(alpaca(200))]
    assert "and 40 more" in finding(prepare(names), "unread_columns").message


def test_images_that_are_left_out_are_said() -> None:
    rows: list[dict[str, Any]] = [{**row, "images": []} for row in alpaca(4)]
    assert "media_left_out" not in codes(prepare(rows))
    rows[1]["images"] = ["cat.png"]
    for keep in (False, True):
        found = finding(prepare(rows, keep_columns=keep), "media_left_out")
        assert (found.severity, found.where) == ("warning", "rows[1]")
        assert found.message.startswith("1 row brings more than text (the first: 'images')")
        assert found.message.endswith("only its text is")


def test_one_text_twice_reads_well(tmp_path: Path) -> None:
    path = write_rows(alpaca(1) * 120 + alpaca(5), tmp_path / "x.jsonl")
    found = finding(prepare(path), "duplicates")
    assert found.message == (
        "120 rows repeat the text of an earlier row (1 text appears more than once); they are kept"
    )
    found = finding(prepare([*alpaca(3), alpaca(1)[0]], duplicates="drop"), "duplicates")
    assert found.message == (
        "1 row repeats the text of an earlier row (1 text appears more than once); it is left out"
    )


def test_every_error_of_a_check_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(alpaca(1)[0]) + '\nNOT JSON\n5\n{"instruction": "q"}\n')
    found = [each for each in prepare(path, stop=False).record.findings if each.severity == "error"]
    assert len(found) == 3
    assert all(each.fix for each in found)


def test_nothing_left_says_to_raise_the_length_only_where_that_helps() -> None:
    with pytest.raises(InputError) as error:
        prepare([{"instruction": "q", "output": None}], on_error="skip")
    assert error.value.fix == "correct the rows"
    with pytest.raises(InputError) as error:
        prepare([{"instruction": "q " * 50, "output": "a"}], max_length=16)
    assert "max_length" in error.value.fix


def test_nothing_is_wrong_with_good_rows() -> None:
    """A healthy set has no error and no warning, so that those are read when they come."""
    data = prepare(alpaca(30), validation_split=0.1)
    assert {found.severity for found in data.record.findings} <= {"info"}
