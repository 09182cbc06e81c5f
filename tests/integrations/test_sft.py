"""The callback and the loss of terms in the real `trl.SFTTrainer`, packed and not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import missing
from tiny import tiny_tokenizer
from trainer_runs import arguments, checkpointing, same_bits, tiny_lora, trained

import glasstune as gt
from glasstune.core.errors import RunError

try:
    import trl
except ImportError:
    missing("trl")

ANSWERS = ["Yes.", "It is the number of items of a container.", "append and extend", "No, never."]


def conversations():
    from datasets import Dataset

    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What does {name} return?"},
                {"role": "assistant", "content": ANSWERS[index % 4]},
            ]
        }
        for index, name in enumerate(["len", "str", "int", "list", "dict", "set"] * 4)
    ]
    return Dataset.from_list(rows)


def make_sft(folder: Path, model=None, callbacks=(), loss=None, **options):
    """A `trl.SFTTrainer` over 24 short conversations."""
    own = {"max_length": 64, "dataset_num_proc": None, **options}
    return trl.SFTTrainer(
        model=tiny_lora(lora_dropout=0.1) if model is None else model,
        args=trl.SFTConfig(**arguments(folder, **own)),
        train_dataset=conversations(),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        compute_loss_func=loss,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True, "max_length": 48},
        {"bf16": True},
        checkpointing(use_reentrant=True),
    ],
    ids=["plain", "packing", "bf16", "reentrant"],
)
def test_the_weights_are_the_same_bit_for_bit(tmp_path: Path, options) -> None:
    without = make_sft(tmp_path / "without", **options)
    without.train()
    callback = gt.GlasstuneCallback(every_n_steps=2)
    ours = make_sft(tmp_path / "with", callbacks=[callback], **options)
    ours.train()
    assert ours.state.global_step == 4
    assert same_bits(trained(without), trained(ours))
    assert not callback.findings
    row = ours.state.log_history[0]
    assert row["glasstune/tensors_without_gradient"] == 0.0
    assert "mean_token_accuracy" in row
