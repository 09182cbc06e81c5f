"""The callback and the loss of terms in the real `trl.SFTTrainer`, packed and not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from trainer_runs import arguments, checkpointing, need_trl, same_bits, tiny_lora, trained

import glasstune as gt
from glasstune.core.errors import RunError

need_trl()
import trl  # noqa: E402

# SFTConfig sets an option whose name transformers 5.24 calls old.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning"
)

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
    own = {"max_length": 64, "bf16": False, **options}  # bf16 is its default
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


@pytest.mark.filterwarnings("ignore:.compute_loss_func. is deprecated:FutureWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_next_token_is_the_sft_trainers_own_loss(tmp_path: Path, packing: bool) -> None:
    """TRL computes it in chunks from the hidden states, so that the last bits may differ."""
    options = {"packing": packing, "max_length": 48, "optim": "sgd", "learning_rate": 1.0}
    own = make_sft(tmp_path / "own", model=tiny_lora(), **options)
    own.train()
    callback = gt.GlasstuneCallback(every_n_steps=1)
    ours = make_sft(
        tmp_path / "ours",
        model=tiny_lora(),
        callbacks=[callback],
        loss=gt.term_loss({"next_token": 1.0, "z_loss": 0.0}),
        **options,
    )
    ours.train()
    assert not callback.findings
    for name, value in trained(own).items():
        torch.testing.assert_close(trained(ours)[name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(own.state.log_history[:4], ours.state.log_history[:4], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["loss/next_token"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.compute_loss_func. is deprecated:FutureWarning")
def test_terms_of_a_packed_run_are_audited(tmp_path: Path) -> None:
    loss = gt.term_loss({"next_token": 1.0, "z_loss": 0.1})
    callback = gt.GlasstuneCallback(every_n_steps=3)
    trainer = make_sft(tmp_path, callbacks=[callback], loss=loss, packing=True, max_length=48)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    records = [row for row in rows if row["event"] == "audit"]
    assert [record["step"] for record in records] == [1, 3]
    for record in records:
        assert record["engine"] == "grad"
        assert record["sum_check"] < 1e-4
        assert sum(term["share"] for term in record["terms"]) == pytest.approx(1)
        logged = trainer.state.log_history[record["step"] - 1]
        for term in record["terms"]:
            assert term["value"] == pytest.approx(logged[f"loss/{term['name']}"], rel=1e-5)


def test_a_dead_adapter_is_refused_with_its_reason(tmp_path: Path) -> None:
    model = tiny_lora()
    path = "base_model.model.model.layers.0.self_attn.v_proj"
    model.get_submodule(path).register_forward_hook(lambda module, args, out: out.detach())
    trainer = make_sft(tmp_path, model=model, callbacks=[gt.GlasstuneCallback()])
    with pytest.raises(RunError, match="2 trained tensors do not learn") as caught:
        trainer.train()
    assert f"{path}.lora_B" in caught.value.message
    assert trainer.state.global_step == 0
