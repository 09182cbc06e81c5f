"""The record of a merge: what was written, and how close it is to the adapted model.

Distances are Kullback-Leibler divergences in nats over the whole vocabulary, by token, of the
model with its adapter against another; both forwards run in float32 unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from glasstune.core.findings import Finding
from glasstune.core.records import Record

Onto = Literal["original", "training"]


@dataclass(slots=True)
class Reader:
    """Whether a program takes the adapter as it is.

    Args:
        accepts: It does, and computes what was trained.
        reasons: Why not, or on which condition.
    """

    accepts: bool
    reasons: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Certificate(Record):
    """Result of `glasstune merge`, and the content of `certificate.json`.

    Args:
        passed: Whether `merge_kl_mean` is at most `max_kl`; None where nothing was measured.
        gate: The number that decides.
        max_kl: Its limit.
        merge_kl_mean: Merged model, read back from the disk, against base and adapter apart on
            the same target base; mean over tokens.
        merge_kl_max: The same at its worst token.
        merge_max_logit_difference: Largest difference of one logit.
        token_agreement: Share of tokens after which both think the same next one most likely.
        greedy_agreement: Share of prompts that both continue alike, `prompts.greedy_tokens` long.
        rounding_kl_mean: What a forward in `dtype` alone moves the merged model by: its logits in
            float32 against those in `dtype`. None for float32.
        base_kl_mean: What the precision of the training's base costs: base and adapter as trained
            against base and adapter on the original. Never a gate; None where it is not known.
        prompts: Their numbers: `held_out`, `generic`, `tokens`, `greedy_tokens`.
        base: `path`, `folder`, `fingerprint`, `trained_on` (the fingerprint that the adapter
            names, or None), `precision` in training (or None).
        onto: Which base the adapter was added to.
        dtype: Type of the merged weights.
        readers: Which programs take the adapter as it is.
        adapter: `path`, `kind` of changes by count, `tensors` used.
        weights: `changed`, `copied` and `bytes` of the output.
        tied: Whether head and embedding share a weight: `kept`, `untied` or `no`.
        output: The folder.
        files: What lies there.
        seconds: By part: `merge`, `certificate`.
        peak_memory_bytes: Largest resident memory of the process.
        choices: What was decided, with reasons.
        findings: What should be known.
        versions: Of the packages that take part.
    """

    passed: bool | None
    gate: str
    max_kl: float
    merge_kl_mean: float | None
    merge_kl_max: float | None
    merge_max_logit_difference: float | None
    token_agreement: float | None
    greedy_agreement: float | None
    rounding_kl_mean: float | None
    base_kl_mean: float | None
    prompts: dict[str, int]
    base: dict[str, Any]
    onto: Onto
    dtype: str
    readers: dict[str, Reader]
    adapter: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    tied: str = "no"
    output: str = ""
    files: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    choices: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
