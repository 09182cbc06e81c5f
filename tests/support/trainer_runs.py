"""Tiny models, rows and real Trainers for the tests of the integrations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch import Tensor


def tiny_lora(
    seed: int = 0, targets: Sequence[str] = ("q_proj", "v_proj", "down_proj"), **options: Any
) -> Any:
    """A random 2-layer Llama with a PEFT adapter; weights are scaled so that its input matters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options)
    return get_peft_model(tiny_base(seed), lora)


def tiny_base(seed: int = 0) -> Any:
    """The same model without the adapter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config())
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(4.0)
    return model


def need_trl() -> None:
    """Skips the calling test file where TRL is not installed; fails where everything must be."""
    if find_spec("trl") is None and not os.environ.get("GLASSTUNE_REQUIRE"):
        pytest.skip("trl is missing", allow_module_level=True)


def token_rows(count: int = 24, seed: int = 1) -> list[dict[str, list[int]]]:
    """Rows of 4 to 12 tokens; the first 0 to 2 of each are not trained."""
    source = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(4, 13, (1,), generator=source))
        ids = torch.randint(2, 500, (length,), generator=source).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (index % 3) + ids[index % 3 :]})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pads rows on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (length - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    """Options of `TrainingArguments` and `SFTConfig` for a few quick updates on a CPU."""
    return {
        "output_dir": str(folder),
        "use_cpu": not os.environ.get("GLASSTUNE_TEST_CUDA"),  # the same tests on a GPU
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }


def checkpointing(use_reentrant: bool) -> dict[str, Any]:
    """The options for it under the name that this release of transformers has."""
    from transformers import TrainingArguments

    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    key = "activation_checkpointing" if new else "gradient_checkpointing"
    return {key: True, f"{key}_kwargs": {"use_reentrant": use_reentrant}}


def make_trainer(
    folder: Path,
    model: Any = None,
    callbacks: Sequence[Any] = (),
    loss: Any = None,
    rows: Any = None,
    eval_rows: Any = None,
    **options: Any,
) -> Any:
    """A `transformers.Trainer` over `token_rows`."""
    from transformers import Trainer, TrainingArguments

    return Trainer(
        model=tiny_lora(lora_dropout=0.1) if model is None else model,
        args=TrainingArguments(**arguments(folder, **options)),
        train_dataset=token_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        data_collator=collate,
        callbacks=list(callbacks),
        compute_loss_func=loss,
    )


def trained(trainer: Any) -> dict[str, Tensor]:
    """The adapter's weights after a run."""
    return {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
