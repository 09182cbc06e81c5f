from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import chat_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glasstune.core.errors import InputError
from glasstune.data.tokenizer import fewest_tokens, load_tokenizer


def test_folder_round_trip(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.chat_template == tokenizer.chat_template
    text = "why? <think> Because"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_folder_without_tokenizer_lists_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(InputError) as error:
        load_tokenizer(str(tmp_path))
    assert error.value.code == "no_tokenizer"
    assert "weights.bin" in error.value.fix


@pytest.mark.parametrize(
    ("said", "code", "hint"),
    [
        ("set the option `trust_remote_code=True`", "remote_code", "trust_remote_code"),
        (
            "You are trying to access a gated repo. 401 Client Error",
            "hub_forbidden",
            "hf auth login",
        ),
        ("We couldn't connect to 'https://huggingface.co'", "no_tokenizer", "HF_ENDPOINT"),
    ],
)
def test_hub_failures_are_explained(
    monkeypatch: pytest.MonkeyPatch, said: str, code: str, hint: str
) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise OSError(said)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    with pytest.raises(InputError) as error:
        load_tokenizer("owner/model")
    assert error.value.code == code
    assert hint in error.value.fix


@pytest.mark.parametrize(
    "text", ["x" * 500, " " * 300 + "a", "the quick brown fox " * 30, "二" * 99]
)
def test_fewest_tokens_is_a_lower_bound(text: str) -> None:
    tokenizer = chat_tokenizer(None)
    assert fewest_tokens(tokenizer, text) <= len(tokenizer(text)["input_ids"])
    assert fewest_tokens(tokenizer, "x" * 100_000) > 100


def test_fewest_tokens_knows_nothing_where_one_token_may_be_a_whole_text() -> None:
    raw = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    assert fewest_tokens(tokenizer, "x" * 100_000) == 0
