"""Which programs take an adapter as it is, and compute what was trained.

What each can do was read from its source in autumn 2026: vLLM `lora/peft_helper.py` and
`lora/lora_model.py`; llama.cpp `convert_lora_to_gguf.py`, which keeps one `lora_alpha` and divides
it by the rank of each tensor.
"""

from __future__ import annotations

from glasstune.adapters.changes import LowRank
from glasstune.core.certificate import Reader
from glasstune.export.merge_plan import MergePlan

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def readers(plan: MergePlan) -> dict[str, Reader]:
    """Judges PEFT, vLLM and llama.cpp; reasons beside an acceptance are its conditions."""
    return {"peft": _peft(plan), "vllm": _vllm(plan), "llama.cpp": _llama_cpp(plan)}


def _peft(plan: MergePlan) -> Reader:
    no, needs = [], []
    if plan.attached.renamed:
        no.append(
            "its tensors' names carry a wrapper's prefix: PEFT loads nothing and only warns "
            f"({plan.attached.stored[0]})"
        )
    if plan.rows is not None:
        needs.append(f"call model.resize_token_embeddings({plan.rows}) on the base first")
    return _reader(no, needs)


def _vllm(plan: MergePlan) -> Reader:
    config = plan.attached.config
    no, needs = _common(plan), []
    if config.use_dora:
        no.append("DoRA is not supported")
    if config.modules_to_save:
        no.append(f"modules_to_save is not supported ({', '.join(config.modules_to_save)})")
    if config.bias != "none" or config.lora_bias:
        no.append("trained biases are not supported")
    if config.rank_pattern or config.alpha_pattern:
        no.append("one scale lora_alpha/r is used for all modules: rank_pattern and alpha_pattern "
                  "are ignored")  # fmt: skip
    if any(_turned_linear(plan)):
        no.append("Conv1D layers (GPT-2) take no adapter")
    rank = max(_ranks(plan), default=0)
    if rank > _VLLM_RANKS[-1]:
        no.append(f"rank {rank} is above its largest, {_VLLM_RANKS[-1]}")
    elif rank > 16:
        least = next(size for size in _VLLM_RANKS if size >= rank)
        needs.append(f"start it with --max-lora-rank {least}")
    if _touches_embedding(plan):
        needs.append("the model's class must take adapters on its embedding or head")
    return _reader(no, needs)


def _llama_cpp(plan: MergePlan) -> Reader:
    config = plan.attached.config
    no, needs = _common(plan), ["convert it with convert_lora_to_gguf.py"]
    if config.use_dora:
        no.append("DoRA's magnitudes are no LoRA tensors: the converter stops")
    if config.modules_to_save:
        no.append("whole saved modules are no LoRA tensors: the converter stops")
    if config.bias != "none" or config.lora_bias:
        no.append("trained biases are no LoRA tensors: the converter stops")
    if config.use_rslora:
        wrong = config.lora_alpha / config.r
        right = config.lora_alpha / config.r**0.5
        no.append(f"rsLoRA is ignored: the scale would be {wrong:g} instead of {right:g}")
    if config.alpha_pattern:
        no.append("alpha_pattern is ignored: one lora_alpha is kept for all modules")
    return _reader(no, needs)


def _common(plan: MergePlan) -> list[str]:
    """What only PEFT knows."""
    config = plan.attached.config
    no = []
    if plan.attached.renamed:
        no.append("its tensors' names carry a wrapper's prefix")
    if plan.rows is not None:
        no.append(f"its vocabulary was resized to {plan.rows:,} rows")
    if config.trainable_token_indices:
        no.append("single trained tokens (trainable_token_indices) are not supported")
    if config.target_parameters:
        no.append("LoRA on bare parameters (target_parameters) is not supported")
    return no


def _turned_linear(plan: MergePlan) -> list[bool]:
    embeddings = {"embed", "wte", "word_embeddings", "embed_tokens", "embed_in"}
    return [
        change.turned
        for name, changes in plan.changes.items()
        for change in changes
        if isinstance(change, LowRank) and name.split(".")[-2] not in embeddings
    ]


def _ranks(plan: MergePlan) -> list[int]:
    return [
        int(change.down.shape[0])
        for changes in plan.changes.values()
        for change in changes
        if isinstance(change, LowRank)
    ]


def _touches_embedding(plan: MergePlan) -> bool:
    ends = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "word_embeddings.weight")
    return any(name.endswith(ends) for name in plan.changes)


def _reader(no: list[str], needs: list[str]) -> Reader:
    return Reader(accepts=not no, reasons=no or needs)
