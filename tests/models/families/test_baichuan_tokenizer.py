"""Baichuan's tokenizer against sentencepiece itself."""

from __future__ import annotations

import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from baichuan import ASSISTANT, USER, save_baichuan, save_tokenizer, sentencepiece_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glasstune.core.errors import InputError
from glasstune.data.tokenizer import encode_plain, load_tokenizer
from glasstune.models.families.baichuan.tokenizer import BaichuanTokenizer, from_sentencepiece
from glasstune.models.families.native import register_native

HARD = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n  \n",
    "  leading and   many    spaces  ",
    "细胞理论是生物科学的一个理论。",
    "你好！ 今天 下雨  吗？\n\n不。",
    "What does len return? It returns the number of items.",
    "0123456789 3.14159 2024年11月25日",
    "def add(x, y):\n    return x + y\n\n\t# tab",
    "😀 é ñ Ω 𝄞 \u200b \ufeff ﬁ Ａ １",
    "龘靐齉 \x00\x01\x7f",
    "<reserved_106>你好<reserved_107> ok <extra_3><extra_4>",
    "< s > <0x41> <unknown>",
    "aaaaaaaaaaa ababababa 哈哈哈哈哈哈哈",
]
ALPHABET = [
    *"aeturn  \n\t.,是的一个细胞理论0123😀éΩ",
    "   ",
    "return",
    "<reserved_33>",
    "生物",
    "it",
]


def processor(content: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=content)


def trained(text: list[str], **options: Any) -> bytes:
    made = io.BytesIO()
    given: dict[str, Any] = {
        "vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "split_digits": True,
        "add_dummy_prefix": False, "remove_extra_whitespaces": False, "unk_id": 0, "bos_id": 1,
        "allow_whitespace_only_pieces": True, "normalization_rule_name": "identity", "eos_id": 2,
        "pad_id": -1, "minloglevel": 3, "hard_vocab_limit": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=made, **{**given, **options}
    )
    return made.getvalue()


def random_texts(count: int, alphabet: list[str], seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(alphabet, k=draw.randint(0, 24))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    register_native("baichuan")
    return save_tokenizer(tmp_path_factory.mktemp("baichuan"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


def test_ids_and_texts_are_sentencepieces(tokenizer):
    truth = processor(sentencepiece_model())
    texts = [*HARD, *random_texts(4000, ALPHABET)]
    found = encode_plain(tokenizer, texts)
    for text, ids in zip(texts, found, strict=True):
        assert ids == truth.encode(text), text
        assert tokenizer.decode(ids) == text == truth.decode(ids)
    assert encode_plain(tokenizer, ["  a"]) != encode_plain(tokenizer, [" a"])
    # A text behind another: nothing is put before it.
    assert encode_plain(tokenizer, ["a", "b"]) == [truth.encode("a"), truth.encode("b")]


def test_all_of_conversations_zh_and_a_vocabulary_made_of_it(real_data, tmp_path):
    rows = json.loads((real_data / "conversations_zh.json").read_text(encoding="utf-8"))
    texts = [turn["value"] for row in rows for turn in row["conversations"]]
    content = trained(texts[:600], vocab_size=4000)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    for model in (content, sentencepiece_model()):
        file.write_bytes(model)
        mine, truth = from_sentencepiece(file), processor(model)
        found = [x.ids for x in mine.encode_batch(texts, add_special_tokens=False)]
        assert found == truth.encode(texts)
        assert sum(map(len, found)) > 100_000
    # Texts of pieces that follow each other by chance make the steps meet that real ones do not.
    truth = processor(content)
    file.write_bytes(content)
    pieces = [truth.id_to_piece(k).replace("▁", " ") for k in range(259, truth.get_piece_size())]
    made = random_texts(2000, pieces)
    mine = from_sentencepiece(file)
    assert [x.ids for x in mine.encode_batch(made, add_special_tokens=False)] == truth.encode(made)


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": True},
        {"byte_fallback": False},
    ],
    ids=str,
)
def test_other_options_of_sentencepiece(options, tmp_path):
    content = trained(HARD * 20, **options)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    mine, truth = from_sentencepiece(file), processor(content)
    for text in [text for text in [*HARD, *random_texts(500, ALPHABET)] if "\x00" not in text]:
        ids = mine.encode(text, add_special_tokens=False).ids
        assert ids == truth.encode(text), text
        if options.get("byte_fallback", True):
            assert mine.decode(ids) == truth.decode(ids)


def test_special_tokens_and_markers(tokenizer):
    assert isinstance(tokenizer, BaichuanTokenizer)
    assert tokenizer.is_fast
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 4096
    assert tokenizer.convert_tokens_to_ids(["<reserved_106>", "<reserved_107>"]) == [195, 196]
    assert (USER, ASSISTANT) == (195, 196)
    assert tokenizer.decode([1, 195, *tokenizer.encode("你好"), 2]) == "<s><reserved_106>你好</s>"
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""
    assert tokenizer("你好")["input_ids"] == processor(sentencepiece_model()).encode("你好")


def test_a_begin_token_unless_the_config_says_no(folder, tmp_path):
    """As the published classes: 13B's config does not name it."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    file = tmp_path / "tokenizer_config.json"
    content = json.loads(file.read_text())
    for key in ("add_bos_token", "add_eos_token"):
        del content[key]
    # The first 7B checkpoint's name of the class.
    file.write_text(json.dumps(content | {"tokenizer_class": "BaiChuanTokenizer"}))
    assert load_tokenizer(str(tmp_path))("a")["input_ids"][0] == 1
    assert load_tokenizer(str(folder))("a")["input_ids"][0] != 1


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_the_checkpoint_never_runs(tmp_path, trust):
    """It raises when it is run; with its model's config beside it too."""
    register_native("baichuan")
    tokenizer = load_tokenizer(
        str(save_baichuan(tmp_path, weights="none")), trust_remote_code=trust
    )
    assert isinstance(tokenizer, BaichuanTokenizer)


def test_what_is_saved_opens_without_us(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in content
    for again in (
        AutoTokenizer.from_pretrained(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert encode_plain(again, HARD) == encode_plain(tokenizer, HARD)
        assert again.decode([195, *again.encode("  a\n")]) == "<reserved_106>  a\n"
        assert (again.eos_token_id, again.pad_token_id) == (2, 0)
        assert again("a")["input_ids"] == tokenizer("a")["input_ids"]


def test_what_cannot_be_the_same_is_refused(tmp_path):
    register_native("baichuan")
    save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(trained(HARD * 20, model_type="unigram", vocab_size=300, byte_fallback=False))
    with pytest.raises(InputError, match="its model is not BPE"):
        load_tokenizer(str(tmp_path))
    file.write_bytes(b"\x00\x01 nothing of the kind")
    with pytest.raises(InputError, match="no sentencepiece model"):
        load_tokenizer(str(tmp_path))
