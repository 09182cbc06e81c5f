"""Generation against the plainest truth: one prompt, no cache, no padding, argmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from glasstune.core.errors import InputError
from glasstune.generation import generate_ids, generate_texts, stop_ids

VOCABULARY = 64
PROMPTS = [[5, 9, 3], [7], [11, 12, 13, 14, 15, 16, 17], [20, 21], [30, 31, 32, 33, 34]]


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48,
                        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        max_position_embeddings=64, initializer_range=0.5)
        )  # fmt: skip
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                       initializer_range=0.5, bos_token_id=1, eos_token_id=2)
        )  # fmt: skip
    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4,
                    initializer_range=0.5, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    )  # fmt: skip


@torch.no_grad()
def truth(model: Any, prompt: Sequence[int], steps: int, stops: Sequence[int] = ()) -> list[int]:
    model.eval()
    ids = list(prompt)
    for _ in range(steps):
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_equals_one_prompt_without_cache(kind: str, batch_size: int) -> None:
    model = tiny(kind)
    want = [truth(model, prompt, 12) for prompt in PROMPTS]
    got = generate_ids(model, PROMPTS, stops=(), max_new_tokens=12, batch_size=batch_size)
    assert got == want
    assert len({tuple(answer) for answer in want}) == len(PROMPTS), "answers that say something"


def test_each_row_stops_at_its_own_end() -> None:
    model = tiny("llama")
    free = [truth(model, prompt, 12) for prompt in PROMPTS]
    stops = (free[0][4], free[2][7])
    want = [truth(model, prompt, 12, stops) for prompt in PROMPTS]
    assert len({len(answer) for answer in want}) > 1
    for batch_size in (1, 5):
        got = generate_ids(model, PROMPTS, stops=stops, max_new_tokens=12, batch_size=batch_size)
        assert got == want


def test_sampling_is_the_rows_own_whatever_the_batch() -> None:
    model = tiny("llama")
    options = {"stops": (), "max_new_tokens": 10, "temperature": 3.0, "top_p": 0.95}
    runs = [
        generate_ids(model, PROMPTS, seed=seed, batch_size=size, **options)  # type: ignore[arg-type]
        for seed, size in ((1, 1), (1, 2), (1, 5), (2, 5))
    ]
    assert runs[0] == runs[1] == runs[2]
    assert runs[3] != runs[0]
    # The same prompt twice has two indices, so two streams.
    twice = generate_ids(model, [PROMPTS[0]] * 2, seed=1, **options)  # type: ignore[arg-type]
    assert twice[0] != twice[1]


def test_sampling_has_the_softmaxs_distribution() -> None:
    model = tiny("llama")
    count = 4000
    drawn = generate_ids(
        model, [PROMPTS[0]] * count, stops=(), max_new_tokens=1, temperature=4.0, batch_size=count
    )
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    want = torch.softmax(logits / 4.0, dim=-1)
    seen = torch.bincount(torch.tensor(drawn).flatten(), minlength=VOCABULARY) / count
    # Five standard deviations of a share.
    assert torch.all((seen - want).abs() < 5 * (want * (1 - want) / count).sqrt() + 1 / count)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    model = tiny("llama")
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    shares, order = torch.softmax(logits / 4.0, dim=-1).sort(descending=True)
    kept = int((shares.cumsum(0) < 0.5).sum()) + 1
    drawn = generate_ids(
        model, [PROMPTS[0]] * 2000, stops=(), max_new_tokens=1, temperature=4.0, top_p=0.5,
        batch_size=2000,
    )  # fmt: skip
    assert {ids[0] for ids in drawn} == set(order[:kept].tolist())


def test_checkpoints_own_generation_config_changes_nothing_and_is_put_back() -> None:
    model = tiny("llama")
    want = generate_ids(model, PROMPTS, stops=(), max_new_tokens=12)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = want[0][2]
    own = model.generation_config
    assert generate_ids(model, PROMPTS, stops=(), max_new_tokens=12) == want
    assert model.generation_config is own


def test_mode_is_put_back_and_dropout_is_off() -> None:
    model = tiny("gpt2")
    want = generate_ids(model, PROMPTS, stops=(), max_new_tokens=6)
    model.train()
    model.transformer.h[0].eval()
    assert generate_ids(model, PROMPTS, stops=(), max_new_tokens=6) == want
    assert model.training
    assert not model.transformer.h[0].training
    assert model.transformer.h[1].training


def test_streaming_hook_sees_every_token_in_order() -> None:
    model = tiny("llama")
    seen: dict[int, list[int]] = {}
    answers = generate_ids(
        model, PROMPTS, stops=(), max_new_tokens=5, batch_size=2,
        on_token=lambda index, token: seen.setdefault(index, []).append(token),
    )  # fmt: skip
    assert [seen[index] for index in range(len(PROMPTS))] == answers


def test_d12_positions_limit_each_row_by_itself() -> None:
    model = tiny("gpt2")
    long = [index % VOCABULARY for index in range(61)]
    answers = generate_ids(
        model, [[5], long], stops=(), max_new_tokens=20, max_positions=64, batch_size=2
    )
    assert [len(answer) for answer in answers] == [20, 3]
    assert answers[0] == truth(model, [5], 20)
    with pytest.raises(InputError, match="64 tokens, the model can place 64"):
        generate_ids(model, [[1] * 64], stops=(), max_positions=64)


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1),
     ("batch_size", 0), ("temperature", float("nan"))],
)  # fmt: skip
def test_options_out_of_range_are_named(option: str, value: float) -> None:
    with pytest.raises(InputError, match=option):
        generate_ids(tiny("llama"), PROMPTS, stops=(), **{option: value})  # type: ignore[arg-type]


def test_empty_prompt_is_named() -> None:
    with pytest.raises(InputError, match="prompt 2"):
        generate_ids(tiny("llama"), [[1], []], stops=())


def test_stop_ids_and_texts() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "<|im_end|>": 2, "<|end|>": 3}
    words |= {f"w{index}": index for index in range(4, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|im_end|>"],
    )  # fmt: skip
    model = tiny("llama")
    model.generation_config.eos_token_id = [1, 9]
    # `<|end|>` is a plain word of this vocabulary, no special token: it may occur in an answer.
    assert stop_ids(tokenizer, model) == (1, 2, 9)
    want = truth(model, PROMPTS[0], 8, (1, 2, 9))
    text = generate_texts(model, tokenizer, [PROMPTS[0]], max_new_tokens=8)
    assert 0 in want, "the answer holds a special token, which is not part of its text"
    names = {index: word for word, index in words.items()}
    assert text == [" ".join(names[index] for index in want if index > 2)]
