"""Conversations and streaming, without a model where none is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_tokenizer

from glasstune.core.errors import InputError
from glasstune.generation import generate_ids, generate_texts
from glasstune.generation.chat import Conversation, TextStream, stream_answer


def words(messages: list[dict[str, Any]]) -> list[int]:
    """One id for each word and one for each turn's mark: lengths can be counted by hand."""
    return [0 for message in messages for _ in (message["role"], *message["content"].split())]


def ask(conversation: Conversation, text: str, answer: str) -> tuple[int, int]:
    ids, dropped = conversation.prompt(text)
    conversation.add(text, answer)
    return len(ids), dropped


def test_history_and_system_are_sent_in_order() -> None:
    conversation = Conversation(words, system="be brief")
    assert ask(conversation, "one two", "a") == (3 + 3, 0)
    assert ask(conversation, "three", "b c") == (3 + 3 + 2 + 2, 0)
    assert conversation.messages("now") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "b c"},
        {"role": "user", "content": "now"},
    ]


def test_the_oldest_questions_go_with_their_answers_and_the_system_prompt_stays() -> None:
    """20 positions, 6 kept for the answer: 14 for the prompt."""
    conversation = Conversation(words, max_positions=20, reserve=6, system="s")
    assert ask(conversation, "a b c", "d e") == (2 + 4, 0)
    assert ask(conversation, "f g", "h") == (2 + 4 + 3 + 3, 0)
    # 2 + 7 + 5 + 2 = 16 is too many; without the first question 9.
    assert ask(conversation, "i", "j") == (2 + 5 + 2, 1)
    assert [turn["content"] for turn in conversation.turns] == ["f g", "h", "i", "j"]
    assert conversation.system == "s"
    # Two at once: 2 + 5 + 4 + 9 > 14, 2 + 4 + 9 > 14, 2 + 9 fits.
    assert ask(conversation, "k " * 8, "l") == (2 + 9, 2)


def test_a_question_that_is_too_long_alone_is_refused_and_nothing_is_lost() -> None:
    conversation = Conversation(words, max_positions=20, reserve=6)
    ask(conversation, "a", "b")
    with pytest.raises(InputError, match="21 tokens, the model can place 20"):
        conversation.prompt("x " * 20)
    assert len(conversation.turns) == 2
    # Between the reserve and the limit the answer gets what is left.
    assert conversation.prompt("x " * 18)[0] == [0] * 19


def test_without_a_template_each_text_stands_alone() -> None:
    conversation = Conversation(words, keeps_history=False)
    ask(conversation, "a b", "c")
    assert len(conversation.prompt("d")[0]) == 2
    assert len(conversation.messages()) == 2, "what was said is kept for the record"


def test_letters_of_several_tokens_come_whole() -> None:
    tokenizer = tiny_tokenizer()
    text = "  é 你好 🚀 \n end \n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text), "letters are spread over tokens"
    pieces: list[str] = []
    stream = TextStream(lambda found: str(tokenizer.decode(found)), pieces.append)
    for token in ids:
        stream.add(token)
        assert "\ufffd" not in "".join(pieces)
        assert not "".join(pieces).endswith((" ", "\n"))
    assert stream.finish() == "".join(pieces) == text.strip()
    assert len(pieces) > 4


def test_an_unfinished_letter_at_the_end_is_shown_in_the_end() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a 你")["input_ids"][:-1]
    pieces: list[str] = []
    stream = TextStream(lambda found: str(tokenizer.decode(found)), pieces.append)
    for token in ids:
        stream.add(token)
    assert "".join(pieces) == "a"
    assert stream.finish() == "".join(pieces) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(tiny_config(max_position_embeddings=64)).eval()
    with torch.no_grad():
        for value in found.parameters():
            if value.dim() > 1:
                value.mul_(6.0)
        found.lm_head.weight[len(tiny_tokenizer()) :] = 0  # ids without a token
    return found


def test_the_stream_is_the_answer_of_generate(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("What does len return?")["input_ids"]
    for options in ({}, {"temperature": 1.5, "seed": 4}):
        pieces: list[str] = []
        answer = stream_answer(
            model, tokenizer, ids, stops=(1,), write=pieces.append, max_new_tokens=20, **options
        )
        want = generate_texts(model, tokenizer, [ids], stops=(1,), max_new_tokens=20, **options)
        assert answer.text == "".join(pieces) == want[0]
        assert len(answer.text) > 5


def test_how_an_answer_ended(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("The list")["input_ids"]
    free = generate_ids(model, [ids], stops=(), max_new_tokens=20)[0]
    fifth = free[5]
    assert fifth not in free[:5]

    def run(**options: Any) -> tuple[int, str]:
        options = {"stops": (), "max_new_tokens": 20, **options}
        answer = stream_answer(model, tokenizer, ids, write=lambda text: None, **options)
        return answer.tokens, answer.ended

    assert run() == (20, "length")
    assert run(stops=(fifth,)) == (5, "end")
    count = iter(range(100))
    assert run(stopped=lambda: next(count) == 2) == (3, "stopped")
    assert run(max_positions=len(ids) + 4) == (4, "length")
    assert model.generation_config is not None
    assert not model.training
