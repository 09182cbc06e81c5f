"""Audited steps of a Trainer's run: `audit.jsonl` against plain autograd, reasons, resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from trainer_runs import checkpointing, collate, make_trainer, tiny_lora, token_rows

import glasstune as gt
from glasstune.core.errors import RunError
from glasstune.integrations.audits import supersede

TERMS = {"next_token": 1.0, "z_loss": 0.05}
LAYER = "base_model.model.model.layers.0"


def rows_of(folder: Path, event: str, name: str = "audit.jsonl") -> list[dict[str, Any]]:
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def records(folder: Path, name: str = "audit.jsonl") -> list[dict[str, Any]]:
    return rows_of(folder, "audit", name)


def run(folder: Path, every: int = 2, model=None, terms: Any = TERMS, **options):
    callback = gt.GlasstuneCallback(every_n_steps=every)
    trainer = make_trainer(
        folder,
        model=tiny_lora() if model is None else model,
        callbacks=[callback],
        loss=gt.term_loss(terms) if terms else None,
        **options,
    )
    trainer.train()
    return trainer, callback


def plain_gradients(model, rows) -> list[dict[str, torch.Tensor]]:
    """Gradient of each term of one update, in plain PyTorch: one batch of all rows."""
    batch = collate(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits, targets = logits[:, :-1].double(), batch["labels"][:, 1:]
    trained = targets != -100
    losses = [
        cross_entropy(logits[trained], targets[trained]),
        logits[trained].logsumexp(-1).square().mean(),
    ]
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    tensors = [model.get_parameter(name) for name in names]
    found = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, tensors, retain_graph=True)
        found.append({name: g.double() for name, g in zip(names, gradients, strict=True)})
    return found


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_the_record_agrees_with_plain_autograd(tmp_path: Path, use_reentrant: bool | None) -> None:
    """Two micro-batches of two rows against one batch of the four, in float64; B is not zero.

    Clipping to 0.01 would be seen in `grad_after`.
    """
    model = tiny_lora()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    rows = token_rows(4)
    truth = plain_gradients(model, rows)
    options = {} if use_reentrant is None else checkpointing(use_reentrant)
    run(tmp_path, model=model, rows=rows, max_steps=1, max_grad_norm=0.01, **options)
    (record,) = records(tmp_path)
    assert record["engine"] == ("backward" if use_reentrant else "grad")
    assert record["step"] == 1
    assert record["sum_check"] < 1e-5
    weights = list(TERMS.values())
    whole = {name: weights[0] * truth[0][name] + weights[1] * truth[1][name] for name in truth[0]}
    assert [row["name"] for row in record["parameters"]] == list(whole)
    for row in record["parameters"]:
        name = row["name"]
        assert row["status"] == "ok"
        assert row["reason"] is None
        assert row["in_optimizer"] is True
        assert row["grad_before"] is None
        assert row["grad_after"]["norm"] == pytest.approx(whole[name].norm().item(), rel=1e-4)
        for term, gradients, weight in zip(TERMS, truth, weights, strict=True):
            at = row["terms"][term]
            assert at["reached"] is True
            assert at["norm"] == pytest.approx(gradients[name].norm().item(), rel=1e-4)
            share = weight * (gradients[name] * whole[name]).sum() / whole[name].square().sum()
            assert at["share"] == pytest.approx(share.item(), abs=1e-4)
    inner = [[sum((a[n] * b[n]).sum() for n in whole).item() for b in truth] for a in truth]
    assert record["gram"][0][1] == pytest.approx(inner[0][1], rel=1e-3)
    assert record["gram"][1][1] == pytest.approx(inner[1][1], rel=1e-4)
    cosine = inner[0][1] / math.sqrt(inner[0][0] * inner[1][1])
    assert [pair["cosine"] for pair in record["conflicts"]] == (
        [pytest.approx(cosine, abs=1e-4)] if cosine < 0 else []
    )


def test_which_steps_are_audited(tmp_path: Path) -> None:
    _, callback = run(tmp_path / "two", every=2)
    assert [record["step"] for record in records(tmp_path / "two")] == [1, 2, 4]
    assert callback.report is not None
    whole, written = callback.report.to_dict(), records(tmp_path / "two")[-1]
    assert {key: written[key] for key in ("terms", "layers", "gram")} == {
        key: whole[key] for key in ("terms", "layers", "gram")
    }
    # The file has the trained tensors alone, the report in memory the frozen ones too.
    trained = [row for row in whole["parameters"] if row["requires_grad"]]
    assert written["parameters"] == trained
    assert len(trained) < len(whole["parameters"])
    run(tmp_path / "never", every=0)
    assert [record["step"] for record in records(tmp_path / "never")] == [1]
    assert [row["step"] for row in rows_of(tmp_path / "never", "norms")] == [1, 2, 3, 4]


def test_without_terms_the_record_tells_of_the_parameters_alone(tmp_path: Path) -> None:
    run(tmp_path, every=0, terms=None)
    (record,) = records(tmp_path)
    assert record["terms"] == []
    assert record["engine"] == "none"
    status = {row["name"]: row["status"] for row in record["parameters"]}
    assert status[f"{LAYER}.self_attn.q_proj.lora_B.default.weight"] == "ok"
    assert set(status.values()) == {"ok", "zero"}
    a = next(
        r
        for r in record["parameters"]
        if r["name"].endswith("0.mlp.down_proj.lora_A.default.weight")
    )
    assert a["status"] == "zero"
    assert a["reason"]["code"] == "partner_zero"


def test_a_none_has_its_reason_in_the_record_and_in_the_refusal(tmp_path: Path) -> None:
    model = tiny_lora()
    layer = model.get_submodule(f"{LAYER}.self_attn.q_proj")
    layer.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(RunError) as caught:
        run(tmp_path, model=model)
    (record,) = records(tmp_path)
    dead = [row for row in record["parameters"] if row["status"] == "none"]
    assert len(dead) == 2
    assert dead[0]["reason"]["text"] in caught.value.message
    # The hook cuts inside the adapted layer: what B gave leads nowhere.
    assert dead[0]["reason"]["code"] == "leads_to_no_loss"
    assert dead[0]["reason"]["module"] == f"{LAYER}.self_attn.q_proj.lora_B.default"


def test_a_switched_off_adapter_is_the_reason(tmp_path: Path) -> None:
    model = tiny_lora()
    model.get_submodule(f"{LAYER}.mlp.down_proj")._disable_adapters = True
    with pytest.raises(RunError, match="disabled") as caught:
        run(tmp_path, model=model)
    assert caught.value.code == "first_step_gate"
    (record,) = records(tmp_path)
    dead = [row for row in record["parameters"] if row["status"] == "none"]
    assert {row["reason"]["code"] for row in dead} == {"adapter_disabled"}


def test_the_layers_norms_are_those_of_the_record(tmp_path: Path) -> None:
    """Live norms and the audit are two readings of one gradient."""
    trainer, callback = run(tmp_path, every=1, max_grad_norm=0.01)
    record = records(tmp_path)[-1]
    squares: dict[str, float] = {}
    for row in record["parameters"]:
        norm = row["grad_after"]["norm"]
        squares[row["layer"]] = squares.get(row["layer"], 0.0) + norm**2
    assert set(callback.layer_norms) == {LAYER, LAYER.replace(".0", ".1")}
    for layer, square in squares.items():
        assert callback.layer_norms[layer] == pytest.approx(math.sqrt(square), rel=1e-5)
    rows = rows_of(tmp_path, "norms")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["layers"] == pytest.approx(callback.layer_norms, rel=1e-6)
    assert rows[-1]["norm"] == pytest.approx(trainer.state.log_history[3]["grad_norm"], rel=1e-5)
    # At B = 0, until the first rate above zero, every A has a gradient that is exactly zero.
    assert [row["zero"] for row in rows] == [6, 6, 0, 0]


def test_resume_moves_the_records_past_the_checkpoint(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path, every=1, max_steps=3, **options)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    (tmp_path / "checkpoint-3").rename(tmp_path / "lost")
    callback = gt.GlasstuneCallback(every_n_steps=2)
    trainer = make_trainer(
        tmp_path, model=tiny_lora(), callbacks=[callback], loss=gt.term_loss(TERMS), **options
    )
    trainer.train(resume_from_checkpoint=True)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    assert [r["step"] for r in records(tmp_path, "audit.superseded.jsonl")] == [3]
    # The same update again, to the same bits.
    again, before = records(tmp_path)[2], records(tmp_path, "audit.superseded.jsonl")[0]
    assert again.pop("attempt") == 2
    assert before.pop("attempt") == 1
    assert again == before
    # A new training in the same folder starts a new file.
    run(tmp_path, every=0, max_steps=1)
    assert [record["step"] for record in records(tmp_path)] == [1]


def test_a_half_written_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text(
        '{"step": 1, "attempt": 3}\n{"step": 5, "attempt": 4}\n{"step": 9, "te', encoding="utf-8"
    )
    assert supersede(path, 4) == 3
    assert path.read_text(encoding="utf-8") == '{"step": 1, "attempt": 3}\n'
    assert supersede(tmp_path / "missing.jsonl", 0) == 0


def test_the_file_can_lie_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "a.jsonl"
    callback = gt.GlasstuneCallback(output=path)
    make_trainer(tmp_path / "run", callbacks=[callback], max_steps=1).train()
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert not (tmp_path / "run" / "audit.jsonl").exists()


def test_an_interrupted_training_does_not_block_the_next(tmp_path: Path) -> None:
    """Stopped by Ctrl-C inside an audited update; then another Trainer over the same model."""
    model = tiny_lora()

    def stop(module, args, out):
        raise KeyboardInterrupt

    handle = model.get_submodule(f"{LAYER}.mlp").register_forward_hook(stop)
    first = gt.GlasstuneCallback()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, model=model, callbacks=[first]).train()
    handle.remove()
    _, second = run(tmp_path, model=model)
    assert not second.findings
    assert first.report is None
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_a_nan_in_an_audited_update_names_the_module_where_it_began(tmp_path: Path) -> None:
    model = tiny_lora()

    def spoil(module, args, out):
        out = out.clone()
        out[0, 0, 0] = float("nan")
        return out

    model.get_submodule(f"{LAYER}.mlp").register_forward_hook(spoil)
    with pytest.raises(RunError, match="loss term 'next_token' is nan") as caught:
        run(tmp_path, model=model)
    assert f"{LAYER}.mlp" in caught.value.message
    assert f"{LAYER}.self_attn" not in caught.value.message.split("finite: ")[0]


def test_an_out_of_memory_error_passes_unchanged(tmp_path: Path) -> None:
    """`auto_find_batch_size` looks for it."""

    def hungry(outputs, labels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, terms={"hungry": hungry})
