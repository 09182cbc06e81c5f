"""The vocabulary of a GGUF file: ids of 200 mixed strings, types, special ids, refusals."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf_models import bpe_tokenizer, half_exact_model, sentencepiece_tokenizer
from gguf_tokenizer import GgufTokenizer, mixed_strings
from runs import QuietProgress

from glasstune.core.errors import InputError
from glasstune.export.gguf import write_gguf

CHAT = "<|im_start|>user\nhi 12<|im_end|>\n<think> so</think><tool call>x<|im_start|>"


def export(folder: Path, tokenizer: Any, rows: int = 640) -> tuple[GgufTokenizer, Any, list[str]]:
    """Returns the file's tokenizer, the folder's as transformers loads it, and what was said."""
    from transformers import AutoTokenizer

    half_exact_model(folder, vocab_size=rows)
    tokenizer.save_pretrained(folder)
    said = QuietProgress()
    (file,) = write_gguf(folder, ["f16"], said)
    return GgufTokenizer(file), AutoTokenizer.from_pretrained(folder), said.lines


def read_by_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, gguf_file="model-f16.gguf")


BPE: dict[str, dict[str, Any]] = {
    "gpt-2": {},
    "smollm": {},
    "qwen2": {},
    "dbrx": {},
    "llama-bpe": {"ignore_merges": True, "bos": True},
    "tekken": {"bos": True},
}


@pytest.mark.parametrize("pre", BPE)
def test_200_strings_have_the_same_ids(pre: str, tmp_path: Path) -> None:
    """By a tokenizer written by hand from the file alone, and by transformers' reading of it."""
    made = bpe_tokenizer("llama-bpe" if pre == "dbrx" else pre, **BPE[pre])
    if pre == "dbrx":  # a word of the vocabulary that no merge makes: llama-bpe would take it
        raw = json.loads(made.backend_tokenizer.to_str())
        left, right = raw["model"]["merges"].pop()
        assert left + right in raw["model"]["vocab"]
        made._tokenizer = type(made.backend_tokenizer).from_str(json.dumps(raw))
    found, theirs, _ = export(tmp_path, made)
    assert found.meta["pre"] == pre
    assert found.meta["model"] == "gpt2"
    again = read_by_transformers(tmp_path)
    strings = [*mixed_strings(), CHAT]
    if pre == "qwen2":  # llama.cpp does not compose; said in a note
        strings = [text for text in strings if unicodedata.is_normalized("NFC", text)]
    assert len(strings) > 150
    for text in strings:
        want = theirs(text)["input_ids"]
        assert found.encode(text) == want, text
        if text != CHAT:  # transformers spells a user's token with a space in bytes
            assert again(text)["input_ids"] == want, text
    assert any(len(found.encode(text)) < len(text) - 3 for text in strings), "merges are used"


@pytest.mark.parametrize("form", ["first", "always", "prepend"])
def test_sentencepiece_has_the_same_ids(form: str, tmp_path: Path) -> None:
    """All forms in which transformers writes a Llama 2 tokenizer."""
    from transformers import PreTrainedTokenizerFast

    made = sentencepiece_tokenizer(tmp_path / "sp")
    if form != "first":
        raw = json.loads(made.backend_tokenizer.to_str())
        if form == "always":
            raw["pre_tokenizer"]["prepend_scheme"] = "always"
        else:
            raw["pre_tokenizer"] = None
            raw["normalizer"] = {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]}  # fmt: skip
        backend = type(made.backend_tokenizer).from_str(json.dumps(raw))
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    found, theirs, said = export(tmp_path / "model", made)
    assert found.meta["model"] == "llama"
    assert "merges" not in found.meta
    strings = mixed_strings()
    if form != "prepend":  # transformers puts no second space there; said in a note
        assert any("starts with one" in line for line in said)
        strings = [text for text in strings if not text.startswith(" ")]
    assert len(strings) > 150
    for text in strings:
        assert found.encode(text) == theirs(text)["input_ids"], text
    if form == "first":  # the form that transformers rebuilds
        again = read_by_transformers(tmp_path / "model")
        for text in strings:
            assert again(text)["input_ids"] == theirs(text)["input_ids"], text
    # Bytes for what the vocabulary lacks, and its order as scores.
    assert found.types[found.ids["<0x0A>"]] == 6
    assert found.types[0] == 2
    assert found.meta["scores"][300] > found.meta["scores"][301]


def test_sentencepiece_scores_order_pieces_as_the_trainer_did(tmp_path: Path) -> None:
    import sentencepiece

    made = sentencepiece_tokenizer(tmp_path / "sp")
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "sp" / "tokenizer.model"))
    found, _, _ = export(tmp_path / "model", made)
    plain = [i for i in range(theirs.get_piece_size()) if found.types[i] == 1]
    assert [theirs.id_to_piece(i) for i in plain] == [found.tokens[i] for i in plain]
    by_score = sorted(plain, key=lambda i: -theirs.get_score(i))
    assert by_score == sorted(plain, key=lambda i: -found.meta["scores"][i])
    for text in mixed_strings():
        if text:
            assert found.encode(text, add_special=False) == theirs.encode(text), text


def test_a_chat_that_opens_with_a_control_token_gets_no_space(tmp_path: Path) -> None:
    """What the model was tuned on has no space behind `<s>`; the reader must add none."""
    made = sentencepiece_tokenizer(tmp_path / "sp")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    found, theirs, said = export(tmp_path / "model", made)
    assert found.meta["add_space_prefix"] is False
    assert any("no space is put before a text" in line for line in said)
    talk = [{"role": "user", "content": "Hello world"}, {"role": "assistant", "content": "I'VE 3"},
            {"role": "user", "content": "你好"}]  # fmt: skip
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert (
        found.encode(text, add_special=False) == theirs(text, add_special_tokens=False)["input_ids"]
    )


def test_types_ids_flags_and_template(tmp_path: Path) -> None:
    found, theirs, _ = export(tmp_path, bpe_tokenizer("gpt-2"), rows=600)
    assert len(found.tokens) == len(found.types) == 600
    kinds = {token: found.types[index] for token, index in found.ids.items()}
    assert kinds["<|im_end|>"] == 3
    assert kinds["<think>"] == kinds["<tool call>"] == 4
    assert kinds["a"] == 1
    assert kinds["[PAD599]"] == 5
    assert found.meta["bos_token_id"] == theirs.bos_token_id
    assert found.meta["eos_token_id"] == theirs.eos_token_id
    assert "padding_token_id" not in found.meta
    assert (found.meta["add_bos_token"], found.meta["add_eos_token"]) == (False, False)
    assert found.chat_template == theirs.chat_template


def test_the_token_that_closes_a_turn_ends_answers_too(tmp_path: Path) -> None:
    made = bpe_tokenizer("gpt-2")
    made.eos_token = "<|begin|>"
    found, theirs, _ = export(tmp_path, made)
    assert found.meta["eos_token_id"] == theirs.convert_tokens_to_ids("<|begin|>")
    assert found.meta["eot_token_id"] == theirs.convert_tokens_to_ids("<|im_end|>")


def test_a_padding_name_never_meets_a_token(tmp_path: Path) -> None:
    made = bpe_tokenizer("gpt-2")
    made.add_tokens(["[PAD630]"])
    found, _, _ = export(tmp_path, made)
    assert len(set(found.tokens)) == 640


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        export(tmp_path, bpe_tokenizer("gpt-2"), rows=450)
    assert error.value.code == "vocabulary_too_large"
    assert "450 rows" in error.value.message


def _other_split(raw: dict[str, Any]) -> None:
    raw["pre_tokenizer"] = {"type": "Whitespace"}


def _prefix_space(raw: dict[str, Any]) -> None:
    raw["pre_tokenizer"]["add_prefix_space"] = True


def _lower(raw: dict[str, Any]) -> None:
    raw["normalizer"] = {"type": "Lowercase"}


def _around(raw: dict[str, Any]) -> None:
    parts = [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}] * 2
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*parts, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_other_split, "splits text by: .*Whitespace"),
        (_prefix_space, "add_prefix_space"),
        (_lower, "normalises text: .*Lowercase"),
        (_around, "around a text"),
    ],
)
def test_unknown_rules_are_refused_in_one_message(change: Any, says: str, tmp_path: Path) -> None:
    made = bpe_tokenizer("gpt-2")
    raw = json.loads(made.backend_tokenizer.to_str())
    change(raw)
    made._tokenizer = type(made.backend_tokenizer).from_str(json.dumps(raw))
    with pytest.raises(InputError, match=says) as error:
        export(tmp_path, made)
    assert error.value.code == "unknown_tokenizer"
    assert "--gguf" in error.value.fix
    assert not list(tmp_path.glob("*gguf*"))


def with_merges(made: Any, change: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    raw = json.loads(made.backend_tokenizer.to_str())
    raw["model"]["merges"] = change(raw["model"]["merges"])
    backend = type(made.backend_tokenizer).from_str(json.dumps(raw))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def last_piece_first(merges: list[Any]) -> list[Any]:
    """What an extended tokenizer looks like: the newest pieces are joined before all others."""
    last = "".join(merges[-1])
    newest = [merge for merge in merges if "".join(merge) == last]
    return [*newest, *(merge for merge in merges if merge not in newest)]


def test_scores_follow_the_merges_not_the_ids(tmp_path: Path) -> None:
    made = sentencepiece_tokenizer(tmp_path / "sp")
    found, theirs, _ = export(tmp_path / "model", with_merges(made, last_piece_first))
    for text in mixed_strings():
        if not text.startswith(" "):
            assert found.encode(text) == theirs(text)["input_ids"], text
    last = "".join(json.loads(made.backend_tokenizer.to_str())["model"]["merges"][-1])
    assert found.meta["scores"][found.ids[last]] == 0 == max(found.meta["scores"])


def parted(merges: list[Any]) -> list[Any]:
    """Two merges that make the same piece, with all others between them."""
    texts = ["".join(merge) for merge in merges]
    twice = next(text for text in texts if texts.count(text) > 1)
    first = merges[texts.index(twice)]
    return [*(merge for merge in merges if merge != first), first]


@pytest.mark.parametrize(
    ("change", "says"), [(parted, "do not follow each other"), (lambda m: m[:-1], "never joins")]
)
def test_merges_that_no_scores_say_are_refused(change: Any, says: str, tmp_path: Path) -> None:
    """A reader of scores would join in another order, or where this tokenizer joins nothing."""
    made = with_merges(sentencepiece_tokenizer(tmp_path / "sp"), change)
    with pytest.raises(InputError, match=says) as error:
        export(tmp_path / "model", made)
    assert error.value.code == "unknown_tokenizer"
