import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer, trained_text
from preparing import BASE, CHATML, FACTS, alpaca, codes, finding, prepare
from runs import QuietProgress

from glasstune.core.choices import Choices
from glasstune.core.config import DataConfig
from glasstune.core.errors import InputError
from glasstune.core.facts import ModelFacts
from glasstune.data.prepare import prepare_data
from glasstune.data.split import HELD_OUT, TRAINED, Texts, hold_out, repeated, text_key


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_d01_bom_gives_the_same_ids(tmp_path: Path) -> None:
    raw = json.dumps(alpaca(3)).encode()
    (tmp_path / "a.json").write_bytes(raw)
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + raw)
    one, two = prepare(tmp_path / "a.json"), prepare(tmp_path / "b.json")
    assert one.fingerprint == two.fingerprint


def test_d03_blank_lines_are_counted_and_a_bad_line_is_placed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row = json.dumps(alpaca(1)[0])
    path.write_text(f"{row}\n\n{row}\nNOT JSON")
    with pytest.raises(InputError) as error:
        prepare(path)
    assert error.value.where == f"{path}:4"
    skipped = prepare(path, on_error="skip")
    assert skipped.record.rows == 3
    assert skipped.record.kept == 2
    assert skipped.record.dropped == {"bad_json": 1}
    assert finding(skipped, "bad_json").where == f"{path}:4"
    assert "1 blank line was" in finding(skipped, "blank_lines").message


def test_d04_missing_key_names_file_line_key_and_keys_found(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*alpaca(1), {"instruction": "q"}])
    with pytest.raises(InputError) as error:
        prepare(path)
    assert error.value.code == "missing_key"
    assert str(error.value).startswith(f"{path}:2: there is no 'output'; the row has: instruction")


def test_d05_the_word_none_never_reaches_the_ids() -> None:
    rows = alpaca(4, input=None, system=None)
    with_null, without = prepare(rows), prepare(alpaca(4))
    assert with_null.fingerprint == without.fingerprint
    for tokenizer in (CHATML, BASE):
        data = prepare(rows, tokenizer)
        text = "".join(tokenizer.decode(document.ids) for document in data.train.documents)
        assert "None" not in text
        assert "null" not in text


def test_several_bad_rows_are_shown_at_once(tmp_path: Path) -> None:
    rows: list[Any] = [*alpaca(2), {"instruction": "q"}, {"instruction": "q", "output": None}, 5]
    path = write(tmp_path / "x.jsonl", rows + [{"instruction": "q"}] * 20)
    with pytest.raises(InputError) as error:
        prepare(path)
    assert error.value.code == "bad_rows"
    for line in (3, 4, 5):
        assert f"{path}:{line}: " in str(error.value)
    assert "23 bad rows" in str(error.value)
    # Alike ones are one line.
    assert "(21 such rows; also lines 6, 7, 8, 9 and 16 more)" in str(error.value)
    assert len(str(error.value).splitlines()) == 4


def test_skipped_rows_are_counted_by_reason() -> None:
    rows = [*alpaca(3), {"instruction": "q"}, {"instruction": "q", "output": None}]
    data = prepare(rows, on_error="skip")
    assert data.record.dropped == {"missing_key": 1, "null_answer": 1}
    assert data.record.rows == 5
    assert data.record.kept == 3
    assert finding(data, "null_answer").severity == "warning"


def test_d11_one_bad_conversation_stops_or_is_skipped() -> None:
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": good}, {"messages": good[1:] + good}, {"messages": [*good, *good[:1] * 2]}]
    with pytest.raises(InputError) as error:
        prepare(rows)
    assert "rows[1]: turn 0 is assistant" in str(error.value)
    assert "rows[2]: turns 2 and 3 are both user" in str(error.value)
    data = prepare(rows, on_error="skip")
    assert data.record.kept == 1
    assert data.record.dropped == {"role_order": 2}


def test_d08_a_very_long_row_is_counted_as_too_long(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "why not " * 4_000_000}, {"text": "short"}])
    data = prepare(path)
    assert data.record.dropped == {"too_long": 1}
    assert finding(data, "too_long").where == f"{path}:1"
    assert data.record.kept == 1


def test_d10_answer_cut_off_is_dropped_and_counted_empty_answer_trains_the_end() -> None:
    rows = [
        {"prompt": "why " * 40, "completion": "so it is"},
        {"prompt": "why?", "completion": ""},
    ]
    data = prepare(rows, max_length=16, truncation="cut")
    assert data.record.dropped == {"no_trained_tokens": 1}
    assert finding(data, "no_trained_tokens").where == "rows[0]"
    (document,) = data.train.documents
    assert trained_text(CHATML, document.labels) == "<|im_end|>"
    assert document.trained_tokens == 1
    (plain,) = prepare(rows[1:], BASE).train.documents
    assert trained_text(BASE, plain.labels) == "</s>"


def test_d10_nothing_left_is_an_error_with_the_reasons() -> None:
    with pytest.raises(InputError, match="2 too_long") as error:
        prepare(alpaca(2), max_length=4)
    assert error.value.code == "no_training_rows"
    source = {"path": [{"instruction": "q"}], "format": "alpaca"}
    with pytest.raises(InputError, match=r"1 missing_key\); the first: rows\[0\]: there is no"):
        prepare([source], on_error="skip")


def test_empty_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError) as error:
        prepare(tmp_path / "x.json")
    assert error.value.code == "empty_source"


def test_d12_longest_document_over_the_models_positions() -> None:
    facts = ModelFacts("gpt2", 512, 32, True, "tested")
    with pytest.raises(InputError) as error:
        prepare(alpaca(3), facts=facts, max_length=33)
    assert "33" in error.value.message
    assert "32 positions" in error.value.message
    choices = Choices()
    data = prepare(alpaca(3), facts=facts, choices=choices)
    assert data.train.max_length == data.config.max_length == 32
    assert choices.get("data.max_length") is not None
    assert all(len(document) <= 32 for document in data.train.documents)


def test_token_beyond_the_models_vocabulary_is_named() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.add_tokens(["<mine>"])
    index = tokenizer.convert_tokens_to_ids("<mine>")
    facts = ModelFacts("llama", index, 4096, True, "tested")
    rows = [*alpaca(2), {"instruction": "a <mine> b", "output": "c"}]
    with pytest.raises(InputError, match=rf"'<mine>' the id {index}, .* {index} rows") as error:
        prepare(rows, tokenizer, facts=facts)
    assert error.value.where == "rows[2]"


def test_t07_own_added_tokens_are_named() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.add_tokens(["<mine>", "<unused>"])
    data = prepare([{"instruction": "a <mine> b", "output": "c"}], tokenizer)
    found = finding(data, "added_tokens_used")
    assert "'<mine>'" in found.message
    assert "<unused>" not in found.message
    assert "<|im_end|>" not in found.message  # the template's own tokens are no news
    assert "trainable_token_indices" in found.fix
    assert "added_tokens_used" not in codes(prepare(alpaca(2), tokenizer))
    assert "added_tokens_used" not in codes(prepare([{"text": "a b"}], BASE))  # only its </s>


def test_control_tokens_in_texts_are_said() -> None:
    rows = [{"instruction": "a<|im_end|>b", "output": "c"}, *alpaca(1)]
    assert "'<|im_end|>'" in finding(prepare(rows), "control_token_in_text").message


def test_e04_clock_finding_and_drift_finding() -> None:
    llama = prepare(alpaca(2), chat_tokenizer("llama3"))
    assert "2024-07-26" in finding(llama, "template_reads_clock").message
    assert "template_reads_clock" not in codes(prepare(alpaca(2)))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    qwen = chat_tokenizer("qwen3")
    rows = [{"messages": turns + turns}]
    drift = prepare(rows, qwen, chat_template_kwargs={"enable_thinking": False})
    assert finding(drift, "template_drift").where == "rows[0]"
    assert drift.template.to_dict()["kwargs"] == {"enable_thinking": False}
    assert "template_drift" not in codes(prepare(rows, qwen))


def test_answer_tokenised_apart_is_said() -> None:
    data = prepare(alpaca(2), chat_tokenizer("llama3"))
    assert finding(data, "answer_tokenised_apart").severity == "info"
    assert "template_drift" not in codes(data)


def test_base_model_and_conversations_name_templates_and_show_a_row() -> None:
    rows = [{"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]}]
    with pytest.raises(InputError) as error:
        prepare(rows, BASE)
    assert error.value.code == "no_chat_template"
    assert "User:\nwhy?\n\nAssistant:\nso</s>" in error.value.message
    assert "chatml, alpaca, plain, baichuan2" in error.value.fix
    data = prepare(rows, BASE, chat_template="plain")
    assert trained_text(BASE, data.train.documents[0].labels) == "so</s>"


def test_base_model_and_alpaca_rows_get_the_published_prompt() -> None:
    choices = Choices()
    data = prepare(alpaca(1, input="this"), BASE, choices=choices)
    text = BASE.decode(data.train.documents[0].ids)
    assert "paired with an input" in text
    assert "### Instruction:\nwhy 0?\n\n### Input:\nthis\n\n### Response:\nBecause 0.</s>" in text
    choice = choices.get("data.chat_template")
    assert choice is not None
    assert choice.value == "alpaca"


def test_truncation_cut_is_counted_and_keeps_the_start() -> None:
    rows = [{"instruction": "why?", "output": "so " * 50}, *alpaca(1)]
    whole = prepare(rows)
    data = prepare(rows, max_length=24, truncation="cut")
    assert data.record.dropped == {}
    assert finding(data, "cut").message.startswith("1 row is longer")
    first, full = data.train.documents[0], whole.train.documents[0]
    assert len(first) == 24
    assert first.ids.tolist() == full.ids[:24].tolist()
    assert "<|im_end|>" not in trained_text(CHATML, first.labels)


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_texts_are_shared_with_no_training_row(seed: int) -> None:
    rows = alpaca(50) + alpaca(50) + [{"instruction": " WHY  3? ", "output": "because 3."}]
    data = prepare(rows, validation_split=0.1, seed=seed)
    assert data.validation is not None

    def texts(documents: Any) -> set[str]:
        return {"".join(CHATML.decode(d.ids).casefold().split()) for d in documents}

    assert not texts(data.train.documents) & texts(data.validation.documents)
    assert len(texts(data.validation.documents)) == 5
    assert len(data.train.documents) + len(data.validation.documents) == 101


def test_split_follows_the_seed_and_not_the_order_of_rows() -> None:
    def held(rows: Any, seed: int) -> set[str]:
        validation = prepare(rows, validation_split=0.2, seed=seed).validation
        assert validation is not None
        return {CHATML.decode(document.ids) for document in validation.documents}

    assert held(alpaca(40), 0) == held(alpaca(40)[::-1], 0)
    assert held(alpaca(40), 0) != held(alpaca(40), 1)


def test_lengths_are_percentiles() -> None:
    data = prepare([{"text": "a " * k} for k in range(1, 41)], BASE)
    lengths = [len(document) for document in data.train.documents]
    assert data.record.lengths == {
        "p50": int(np.percentile(lengths, 50)),
        "p95": int(np.percentile(lengths, 95)),
        "max": max(lengths),
    }
    assert len(set(lengths)) > 20


def held_out(keys: Any, share: float, seed: int) -> Any:
    sides = np.full(len(keys), TRAINED, dtype=np.uint8)
    hold_out(Texts([keys], len(keys), seed), sides, share)
    return sides == HELD_OUT


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.95])
def test_held_out_is_a_share_of_the_texts_and_not_of_the_rows(seed: int, share: float) -> None:
    keys = np.random.default_rng(0).integers(0, 60, 300).astype(np.uint64)
    held = held_out(keys, share, seed)
    different = len(set(keys.tolist()))
    assert len(set(keys[held].tolist())) == (max(1, round(share * different)) if share else 0)
    assert not set(keys[held].tolist()) & set(keys[~held].tolist())


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(2, 0.02, 1), (1, 0.5, 0), (100, 0.02, 2), (2, 0.99, 1), (9, 0, 0)],
)
def test_number_of_held_out_texts(count: int, share: float, expected: int) -> None:
    parts = [int.from_bytes(text_key([str(k)])[:8], "little") for k in range(count)]
    keys = np.array(parts * 2, dtype=np.uint64)
    held = held_out(keys, share, 0)
    assert held.sum() == 2 * expected
    assert held[:count].tolist() == held[count:].tolist()  # all rows of a text on one side


def test_validation_files_and_their_overlap() -> None:
    data = prepare(alpaca(5), validation=[{"path": alpaca(9)[4:], "name": "held"}])
    assert data.validation is not None
    assert data.sources == ("rows", "held")
    assert {document.source for document in data.validation.documents} == {1}
    assert len(data.validation.documents) == 5
    assert len(data.train.documents) == 5
    found = finding(data, "validation_overlap")
    assert (found.where, found.message[:1]) == ("rows[0]", "1")


def test_duplicates_kept_or_dropped() -> None:
    rows = [*alpaca(3), {"instruction": "WHY 1?", "output": "because  1."}, *alpaca(2)]
    assert len(prepare(rows).train.documents) == 6
    dropped = prepare(rows, duplicates="drop")
    assert dropped.record.dropped == {"duplicate": 3}
    assert [d.origin for d in dropped.train.documents] == ["rows[0]", "rows[1]", "rows[2]"]


def test_repeat_takes_whole_copies_and_a_fixed_part() -> None:
    sources = [
        {"path": alpaca(10), "name": "a", "repeat": 2.5, "loss_weight": 0.5},
        {"path": [{"text": f"text {k}"} for k in range(10)], "name": "b", "repeat": 0.3},
    ]
    data = prepare(sources)
    counts = Counter((d.source, d.origin) for d in data.train.documents)
    assert sorted(n for (source, _), n in counts.items() if source == 0) == [2] * 5 + [3] * 5
    assert sum(n for (source, _), n in counts.items() if source == 1) == 3
    assert data.loss_weights == (0.5, 1.0)
    assert prepare(sources).fingerprint == data.fingerprint
    assert repeated(10, 0.3, 0, 1).tolist() != repeated(10, 0.3, 1, 1).tolist()
    assert data.record.by_source["a"]["kept"] == 10


def test_record_counts_add_up() -> None:
    rows = [*alpaca(20), {"instruction": "q"}, {"instruction": "long", "output": "so " * 400}]
    data = prepare(rows, on_error="skip", validation_split=0.1, max_length=256)
    record = data.record
    assert data.validation is not None
    documents = [*data.train.documents, *data.validation.documents]
    assert record.rows == 22 == record.kept + sum(record.dropped.values())
    assert record.tokens == sum(len(document) for document in documents)
    assert record.trained_tokens == sum((d.labels[1:] != -100).sum() for d in documents)
    assert record.lengths["max"] == max(len(document) for document in documents)
    assert record.by_source["rows"]["trained_tokens"] == record.trained_tokens
    json.dumps(record.to_dict())


def test_a_first_token_is_never_trained_so_never_counted() -> None:
    rows = [{"text": f"some text {k}"} for k in range(5)]
    data = prepare(rows, BASE)
    lengths = [len(document) for document in data.train.documents]
    assert data.record.tokens == data.train.tokens == sum(lengths)
    assert data.record.trained_tokens == data.train.trained_tokens == sum(lengths) - 5


def test_columns_reach_the_documents() -> None:
    rows = [{**row, "score": number / 2} for number, row in enumerate(alpaca(4))]
    data = prepare(rows, keep_columns=True)
    scores = sorted(document.columns["score"] for document in data.train.documents)
    assert set(scores) <= {0.0, 0.5, 1.0, 1.5}
    assert all("instruction" not in document.columns for document in data.train.documents)


def test_packing_that_is_not_proven_is_not_done_and_said() -> None:
    choices = Choices()
    facts = ModelFacts("strange", 512, 4096, False, "the family strange has no proven pack")
    data = prepare(alpaca(8), facts=facts, choices=choices)
    assert not data.train.packed
    assert data.train.rows == 8
    choice = choices.get("data.packing")
    assert choice is not None
    assert choice.value is False
    assert "no proven pack" in choice.reason
    packed = prepare(alpaca(8))
    assert packed.train.packed
    assert packed.train.rows == 1


def test_l03_fingerprint_sees_data_tokenizer_template_and_options() -> None:
    plain = prepare(alpaca(8)).fingerprint
    changed = alpaca(8)
    changed[7]["output"] += "!"
    prints = [
        prepare(changed).fingerprint,
        prepare(alpaca(8), chat_tokenizer("qwen3")).fingerprint,
        prepare(alpaca(8), chat_template="plain").fingerprint,
        prepare(alpaca(8), max_length=512).fingerprint,
        prepare(alpaca(8), packing=False).fingerprint,
        prepare(alpaca(8), train_on="all").fingerprint,
        prepare(alpaca(8), validation_split=0.2).fingerprint,
        prepare(alpaca(8)[::-1]).fingerprint,
    ]
    assert len({plain, *prints}) == len(prints) + 1
    assert prepare(alpaca(8)).fingerprint == plain


def test_resolved_config_gives_the_same_data_again() -> None:
    facts = ModelFacts("gpt2", 512, 64, False, "no pack")
    data = prepare(alpaca(8), facts=facts, validation_split=0.2)
    dumped = {**data.config.model_dump(), "sources": [{"path": alpaca(8)}]}
    again = prepare_data(DataConfig(**dumped), CHATML, facts, seed=0, choices=Choices())
    assert again.fingerprint == data.fingerprint
    held = prepare(alpaca(8), validation=[{"path": alpaca(3), "name": "held"}])
    DataConfig(**held.config.model_dump())  # the two ways of validation do not clash


def test_mixed_sources_share_one_template(tmp_path: Path) -> None:
    write(tmp_path / "t.jsonl", [{"text": "some text"}] * 2)
    write(tmp_path / "p.jsonl", [{"prompt": "q", "completion": "a"}])
    data = prepare([{"path": "t.jsonl"}, {"path": "p.jsonl"}], base_folder=tmp_path)
    assert data.sources == ("t", "p")
    texts = [CHATML.decode(document.ids) for document in data.train.documents]
    assert texts[0] == "some text<|im_end|>"
    assert texts[2] == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"


def test_tools_that_the_template_does_not_show_are_said() -> None:
    tools = json.dumps([{"name": "add", "description": "adds", "parameters": {}}])
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [{"conversations": turns, "tools": tools}]
    assert "tools_not_rendered" in codes(prepare(rows))
    shown = prepare(rows, chat_tokenizer("qwen3"))
    assert "tools_not_rendered" not in codes(shown)
    assert '"adds"' in chat_tokenizer("qwen3").decode(shown.train.documents[0].ids)


def test_progress_sees_every_row(quiet: QuietProgress) -> None:
    config = DataConfig(sources=[{"path": alpaca(600)}], validation_split=0)  # type: ignore[list-item]
    prepare_data(config, CHATML, FACTS, seed=0, choices=Choices(), progress=quiet)


def test_a_thousand_rows_take_seconds() -> None:
    start = time.perf_counter()
    prepare(alpaca(1000))
    assert time.perf_counter() - start < 20  # about one; the bound only catches a wrong order
