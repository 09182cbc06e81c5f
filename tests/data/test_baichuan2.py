"""The published rule, said again in the simplest way, against the encoder on real rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import chat_tokenizer, trained_text

from glasstune.core.choices import Choices
from glasstune.core.config import DataConfig
from glasstune.core.errors import InputError
from glasstune.core.facts import ModelFacts
from glasstune.data.encode import encode_prompt
from glasstune.data.errors import RowError
from glasstune.data.prepare import PreparedData, prepare_data
from glasstune.data.template import resolve_template

FACTS = ModelFacts("baichuan", 640, 4096, True, "tested")


def published(tokenizer: Any, turns: Any, limit: int, user: int, bot: int) -> tuple[Any, Any]:
    ids, labels = [], []
    for turn in turns:
        text = tokenizer.encode(turn["value"], add_special_tokens=False)
        if turn["from"] == "human":
            ids.append(user)
            labels.append(tokenizer.eos_token_id)
            for token in text:
                ids.append(token)
                labels.append(-100)
        else:
            ids.append(bot)
            labels.append(-100)
            for token in text:
                ids.append(token)
                labels.append(token)
    ids.append(tokenizer.eos_token_id)
    labels.append(tokenizer.eos_token_id)
    return ids[:limit], labels[:limit]


def prepare(path: Path, tokenizer: Any, **options: Any) -> PreparedData:
    config = DataConfig(
        sources=[{"path": str(path), "format": "baichuan2"}],  # type: ignore[list-item]
        validation_split=0,
        **options,
    )
    return prepare_data(config, tokenizer, FACTS, seed=0, choices=Choices())


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"why {k}?"},
                {"from": "gpt", "value": "Because it is so. " * k},
            ]
            * (1 + k % 3)
        }
        for k in range(1, 30)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("limit", [512, 64])
@pytest.mark.parametrize("markers", [(195, 196), (7, 300)])
def test_made_rows_follow_the_rule(rows_file: Path, limit: int, markers: tuple[int, int]) -> None:
    _compare(rows_file, limit, markers)


@pytest.mark.parametrize("limit", [512, 4096])
def test_all_of_conversations_zh_follow_the_rule(real_data: Path, limit: int) -> None:
    assert _compare(real_data / "conversations_zh.json", limit, (195, 196)) == 667


def _compare(path: Path, limit: int, markers: tuple[int, int]) -> int:
    tokenizer = chat_tokenizer(None)
    user, bot = markers
    data = prepare(
        path, tokenizer, max_length=limit, markers={"user": user, "assistant": bot}, packing=False
    )
    truth = json.loads(path.read_text(encoding="utf-8"))
    kept = {document.origin: document for document in data.train.documents}
    assert len(kept) + sum(data.record.dropped.values()) == len(truth)
    documents = iter(data.train.documents)
    for row in truth:
        ids, labels = published(tokenizer, row["conversations"], limit, user, bot)
        if all(label == -100 for label in labels[1:]):
            continue  # a prompt that fills the whole length trains nothing: dropped, counted
        document = next(documents)
        assert document.ids.tolist() == ids
        assert document.labels.tolist() == labels
    assert next(documents, None) is None
    return len(truth)


def test_user_marker_is_labelled_with_the_end_token() -> None:
    tokenizer = chat_tokenizer(None)
    template = resolve_template(tokenizer, "baichuan2", {})
    messages = [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "no"},
    ]
    ids, labels = template.encode(messages)
    second = [k for k, token in enumerate(ids) if token == 195][1]
    assert labels[second] == tokenizer.eos_token_id != ids[second]
    assert trained_text(tokenizer, labels[1:]) == "yes</s>no</s>"
    only = template.encode(messages, train_on="last_assistant")[1]
    assert trained_text(tokenizer, only) == "no</s>"
    prompt = encode_prompt(tokenizer, template, messages[:-1])
    assert ids[: len(prompt)] == prompt
    assert prompt[-1] == 196


def test_tools_have_no_place_and_system_is_context() -> None:
    template = resolve_template(chat_tokenizer(None), "baichuan2", {})
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, labels = template.encode([{"role": "system", "content": "be"}, *chat])
    plain, _ = template.encode(chat)
    assert ids[-len(plain) :] == plain
    assert labels[: len(ids) - len(plain)] == [-100] * (len(ids) - len(plain))
    call = {**chat[1], "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(RowError, match="knows no tools"):
        template.encode([chat[0], call])


def test_markers_outside_the_vocabulary_are_an_input_error() -> None:
    with pytest.raises(InputError, match="assistant: 99999"):
        resolve_template(
            chat_tokenizer(None), "baichuan2", {}, markers={"user": 195, "assistant": 99999}
        )


def test_the_rule_and_another_template_contradict(rows_file: Path) -> None:
    with pytest.raises(InputError, match="encodes without a template") as error:
        prepare(rows_file, chat_tokenizer(None), chat_template="chatml")
    assert error.value.code == "template_conflict"


def test_cutting_is_the_default_and_is_said(rows_file: Path) -> None:
    data = prepare(rows_file, chat_tokenizer(None), max_length=40)
    assert data.config.truncation == "cut"
    assert any(finding.code == "cut" for finding in data.record.findings)
    dropped = prepare(rows_file, chat_tokenizer(None), max_length=40, truncation="drop")
    assert dropped.record.dropped["too_long"] > 0


def test_its_own_tokenizer_gives_the_published_ids_and_labels(
    real_data: Path, tmp_path: Path
) -> None:
    """All rows, by sentencepiece itself; and a prompt's ids are what precedes the answer."""
    import sentencepiece
    from baichuan import ASSISTANT, USER, save_tokenizer, sentencepiece_model

    from glasstune.data.tokenizer import load_tokenizer
    from glasstune.models.families.native import register_native

    register_native("baichuan")
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path)))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    path = real_data / "conversations_zh.json"
    data = prepare(path, tokenizer, max_length=4096, packing=False)
    template = resolve_template(tokenizer, "baichuan2", {})
    documents = iter(data.train.documents)
    seen = 0
    for row in json.loads(path.read_text(encoding="utf-8")):
        ids: list[int] = []
        labels: list[int] = []
        asked: list[dict[str, Any]] = []
        for turn in row["conversations"]:
            text = pieces.encode(turn["value"])
            human = turn["from"] == "human"
            if not human:
                assert encode_prompt(tokenizer, template, asked) == [*ids, ASSISTANT]
            ids += [USER if human else ASSISTANT, *text]
            labels += [2, *[-100] * len(text)] if human else [-100, *text]
            asked.append({"role": "user" if human else "assistant", "content": turn["value"]})
        ids, labels = [*ids, 2][:4096], [*labels, 2][:4096]
        if all(label == -100 for label in labels[1:]):
            continue
        document = next(documents)
        assert document.ids.tolist() == ids
        assert document.labels.tolist() == labels
        seen += 1
    assert next(documents, None) is None
    assert seen > 600
