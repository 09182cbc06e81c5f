"""The real data sets through tiny tokenizers; every trained text against the raw file."""

import json
from pathlib import Path

import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer, trained_text
from preparing import CHATML, prepare

from glasstune.core.errors import InputError
from glasstune.core.facts import ModelFacts

BIG = ModelFacts("llama", 512, 65536, True, "tested")


def test_glaive_tool_calls(real_data: Path) -> None:
    path = real_data / "glaive_toolcall_en_demo.json"
    tokenizer = chat_tokenizer("qwen3")
    data = prepare(path, tokenizer, max_length=65536, facts=BIG)
    assert data.record.kept == data.record.rows == 300
    raw = json.loads(path.read_text(encoding="utf-8"))
    for document, row in zip(data.train.documents, raw, strict=True):
        trained = trained_text(tokenizer, document.labels)
        turns = [t for t in row["conversations"] if t["from"] in ("gpt", "function_call")]
        assert trained.count("<|im_end|>") == len(turns)
        for turn in turns:
            if turn["from"] == "gpt":
                assert turn["value"].strip("\n") + "<|im_end|>" in trained
            else:
                assert f'"name": "{json.loads(turn["value"])["name"]}"' in trained
        for turn in row["conversations"]:
            if turn["from"] == "observation":
                assert "<tool_response>" not in trained
    with pytest.raises(InputError, match="does not render the tool call"):
        prepare(path)


@pytest.mark.parametrize("name", ["alpaca_en_demo", "alpaca_zh_demo"])
def test_real_alpaca_rows(real_data: Path, name: str) -> None:
    raw = json.loads((real_data / f"{name}.json").read_text(encoding="utf-8"))
    data = prepare(real_data / f"{name}.json", max_length=65536, facts=BIG, packing=False)
    assert data.record.kept == len(raw)
    for document, row in zip(data.train.documents, raw, strict=True):
        assert trained_text(CHATML, document.labels) == row["output"] + "<|im_end|>"


def test_preference_file_is_refused(real_data: Path) -> None:
    with pytest.raises(InputError, match="preference pairs"):
        prepare(real_data / "dpo_en_demo.json")


def test_real_text_rows(real_data: Path) -> None:
    data = prepare(real_data / "c4_demo.jsonl", max_length=65536, facts=BIG)
    assert data.record.kept == 300
    for document in data.train.documents:
        assert document.ids[-1] == CHATML.eos_token_id
        assert np.array_equal(document.ids, document.labels)
