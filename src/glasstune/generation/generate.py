"""Batched answers. A prompt's answer does not depend on its neighbours in the batch.

transformers' `generate` runs the model; padding, stopping and drawing are ours: rows are padded
on the left whatever the tokenizer says, each row has its own length limit, and each row draws
from its own random stream.

Shape letters: B rows of a batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from glasstune.core.errors import InputError
from glasstune.core.protocols import Progress
from glasstune.generation.evaluate import evaluation_mode

TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
)
"""Tokens that close an answer in the families' templates, beside the tokenizer's own end."""

OnToken = Callable[[int, int], None]
"""(index of the prompt, token id), called as soon as a token is known."""


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> tuple[int, ...]:
    """Collects the ids that end an answer.

    Args:
        tokenizer: Its end token counts, and those of `TURN_ENDS` that it knows as special.
        model: Its generation config may name more.

    Returns:
        Ids in ascending order; empty where nothing ends an answer but its length.
    """
    found: set[int] = set()
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for value in (tokenizer.eos_token_id, configured):
        found.update([value] if isinstance(value, int) else value or [])
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    special.update(tokenizer.all_special_tokens)
    found.update(tokenizer.convert_tokens_to_ids(token) for token in TURN_ENDS if token in special)
    return tuple(sorted(found))


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int] | None = None,
    **options: Any,
) -> list[str]:
    """`generate_ids`, decoded: without the end token and other special tokens.

    Args:
        model: A causal language model.
        tokenizer: Decodes; gives the stop ids where `stops` is None.
        prompts: Token ids of each prompt, generation prompt included.
        stops: Ids that end an answer.
        **options: Those of `generate_ids`.

    Returns:
        One text a prompt, in the prompts' order.

    Raises:
        InputError: As `generate_ids`.
    """
    if stops is None:
        stops = stop_ids(tokenizer, model)
    answers = generate_ids(model, prompts, stops=stops, **options)
    return [
        str(
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ).strip()
        for ids in answers
    ]


def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    max_positions: int | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    on_token: OnToken | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continues each prompt until a stop id or a limit.

    Args:
        model: A causal language model with transformers' `generate`.
        prompts: Token ids of each prompt; none empty.
        stops: Ids that end an answer; they are not part of it.
        max_new_tokens: Longest answer.
        temperature: 0 takes the most likely token each time; else logits are divided by it.
        top_p: Draws only among the most likely tokens that together reach this probability.
        seed: With the prompt's index the seed of its draws, so batches do not change answers.
        batch_size: Prompts in one forward. Prompts of similar length go together.
        max_positions: Longest row that the model can place; None = no limit.
        precision: Opens the context of each forward.
        on_token: Streaming hook.
        progress: Shows the prompts done.

    Returns:
        New ids of each prompt, in the prompts' order.

    Raises:
        InputError: A prompt is empty or fills the model's positions, or an option is out of range.
    """
    _check(prompts, max_new_tokens, temperature, top_p, batch_size, max_positions)
    limits = [
        max_new_tokens
        if max_positions is None
        else min(max_new_tokens, max_positions - len(prompt))
        for prompt in prompts
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    if progress is not None:
        progress.start("generate", len(prompts), "prompts")
    try:
        with torch.no_grad(), evaluation_mode(model), _plain_generation_config(model):
            for indices in _batches(prompts, limits, max_new_tokens, batch_size):
                rows = _Rows(indices, [limits[i] for i in indices], frozenset(stops), on_token)
                sampler = _Sampler(indices, temperature, top_p, seed) if temperature > 0 else None
                with precision():
                    _run(model, [prompts[index] for index in indices], rows, sampler)
                for index, ids in zip(indices, rows.answers, strict=True):
                    answers[index] = ids
                if progress is not None:
                    progress.advance("generate", len(indices))
    finally:
        if progress is not None:
            progress.finish("generate")
    return answers


def _batches(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], max_new_tokens: int, batch_size: int
) -> Iterator[list[int]]:
    """Yields the indices of prompts that run together.

    Similar lengths go together, so that little is padded. A prompt that will reach the model's
    last position runs alone: a row that is done still steps on until its batch is.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    free = [index for index in order if limits[index] == max_new_tokens]
    for start in range(0, len(free), batch_size):
        yield free[start : start + batch_size]
    for index in order:
        if limits[index] != max_new_tokens:
            yield [index]


def _check(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    max_positions: int | None,
) -> None:
    ranges = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    )
    for name, value, fits, wanted in ranges:
        if not fits:
            raise InputError(
                "bad_option",
                f"{name} is {value}, but must be {wanted}",
                where="--" + name.replace("_", "-"),
                fix=f"give {name} a value of {wanted}",
            )
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(
                "empty_prompt",
                "the prompt has no token",
                where=f"prompt {index + 1}",
                fix="write at least one word, or use a chat template",
            )
        if max_positions is not None and len(prompt) >= max_positions:
            raise InputError(
                "prompt_too_long",
                f"the prompt has {len(prompt)} tokens, the model can place {max_positions}, and "
                "the answer needs at least one",
                where=f"prompt {index + 1}",
                fix="shorten the prompt",
            )


def _run(
    model: nn.Module, prompts: list[Sequence[int]], rows: _Rows, sampler: _Sampler | None
) -> None:
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    # Any id serves as padding: the mask hides it. 0 is in every vocabulary.
    ids_BL = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask_BL[row, longest - len(prompt) :] = 1
    model.generate(  # type: ignore[operator]
        input_ids=ids_BL.to(device),
        attention_mask=mask_BL.to(device),
        generation_config=GenerationConfig(
            max_new_tokens=max(rows.limits),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=0,
        ),
        logits_processor=LogitsProcessorList([] if sampler is None else [sampler]),
        stopping_criteria=StoppingCriteriaList([rows]),
    )


class _Rows(StoppingCriteria):
    """Collects each row's new tokens and says which rows are done."""

    def __init__(
        self,
        indices: Sequence[int],
        limits: Sequence[int],
        stops: frozenset[int],
        on_token: OnToken | None,
    ) -> None:
        self.indices, self.limits, self.stops = indices, limits, stops
        self.on_token = on_token
        self.answers: list[list[int]] = [[] for _ in indices]
        self.done = [False] * len(indices)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.done[row]:
                continue
            if token in self.stops:
                self.done[row] = True
                continue
            self.answers[row].append(token)
            if self.on_token is not None:
                self.on_token(self.indices[row], token)
            self.done[row] = len(self.answers[row]) >= self.limits[row]
        return torch.tensor(self.done, device=input_ids.device)


class _Sampler(LogitsProcessor):
    """Draws a token for each row and makes it the largest score.

    Each row has its own generator, so that a row's draws do not depend on the batch. The draw is
    Gumbel's: the largest of (log probability + Gumbel noise) has the softmax's distribution.
    """

    def __init__(self, indices: Sequence[int], temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        # Mixed by multiplication with odd constants: (seed, index) pairs must not collide.
        self.generators = [
            torch.Generator().manual_seed((seed * 0x9E3779B1 + index * 0x85EBCA77 + 1) % 2**63)
            for index in indices
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p_BV = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, order = log_p_BV.sort(dim=-1, descending=True)
            before = ordered.exp().cumsum(dim=-1) - ordered.exp()
            outside = torch.zeros_like(before, dtype=torch.bool)
            outside.scatter_(-1, order, before >= self.top_p)
            log_p_BV = log_p_BV.masked_fill(outside, float("-inf"))
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g) for g in self.generators])
        # rand may give 0: then the noise would be -inf, which only rules out one token of many.
        noise_BV = -torch.log(-torch.log(uniform.clamp_min(1e-30))).to(scores.device)
        chosen_B1 = (log_p_BV + noise_BV).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter(-1, chosen_B1, 0.0)


@contextmanager
def _plain_generation_config(model: nn.Module) -> Iterator[None]:
    """Hides the checkpoint's generation config, whose values would fill what we leave open.

    Qwen's, for example, brings a repetition penalty that would change a greedy answer unsaid.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own
