"""Loss terms in the plan, against the peak of the allocator while a real update runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from allocating import allocated
from runs import QuietProgress, tiny_run
from tiny import save_tiny_model

from glasstune.audit.update import UpdateAudit
from glasstune.core.choices import Choices
from glasstune.core.recompute import Recompute
from glasstune.planner.peak import moments
from glasstune.training.step import compute_update
from glasstune.workflows.plan_batch import largest_batch
from glasstune.workflows.plan_work import Work
from glasstune.workflows.prepare_run import Prepared, prepare
from glasstune.workflows.trained_model import open_trained

ROWS = 4
TERMS = {
    "next": [{"name": "next_token"}],
    "z": [{"name": "next_token"}, {"name": "z_loss", "weight": 0.1}],
    "kl": [{"name": "next_token"}, {"name": "kl_to_base", "weight": 0.1}],
    "kl alone": [{"name": "kl_to_base"}],
    "some": [{"name": "next_token"}, {"name": "kl_to_base", "weight": 0.1, "sources": ["qa"]}],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whose peak is in the loss, and one whose peak is in its layers."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "wide": save_tiny_model(folder / "wide", num_hidden_layers=6, vocab_size=4096),
        "deep": save_tiny_model(
            folder / "deep", num_hidden_layers=6, hidden_size=128, intermediate_size=512
        ),
    }


def real_peak(prepared: Prepared, forwards: int, audited: bool) -> int:
    """Runs an update of the longest batch; the second one is measured."""
    adapted, _, optimizer = open_trained(prepared, lambda _: None)
    adapted.model.train()
    batch = largest_batch(prepared.data.train, ROWS, prepared.pad_id)
    audit = UpdateAudit(adapted.model, optimizer)
    hooks = [audit] if audited else []

    def update() -> None:
        if audited:
            audit.before_update(1)
        compute_update(
            adapted, prepared.terms, [batch] * forwards, 1, 0, hooks,
            counting=audit if audited else None,
        )  # fmt: skip
        if audited:
            audit.after_backward(1, adapted.model, optimizer)
        optimizer.zero_grad(set_to_none=True)

    update()
    return allocated(update)


def prepared_run(
    model: Path, data: Path, output: Path, terms: str, forwards: int, audited: bool, **adapter: Any
) -> Prepared:
    config = tiny_run(
        model, data, output, losses=TERMS[terms], model={"dtype": "bfloat16"}, adapter=adapter,
        training={"train_batch_size": ROWS * forwards, "per_device_train_batch_size": ROWS},
        audit={"every_n_steps": 1 if audited else 0},
    )  # fmt: skip
    return prepare(config, Choices(), QuietProgress())


def planned_bytes(work: Work, policy: Recompute, forwards: int) -> dict[str, int]:
    """Peak of each phase of the step, above what stays."""
    found = moments(
        work.static, work.activations, policy, context=0, split=work.model.setup.split,
        accumulates=forwards > 1,
    )  # fmt: skip
    static = work.static
    stays = static.base + static.wide + static.adapters + static.optimizer
    phases = ("forward", "loss", "audit", "backward")
    return {moment.phase: moment.bytes - stays for moment in found if moment.phase in phases}


@pytest.mark.parametrize(
    ("terms", "shape", "forwards", "audited", "recomputed", "phase"),
    [
        ("next", "wide", 1, False, False, "loss"),
        ("z", "wide", 1, False, True, "loss"),
        ("kl", "wide", 1, False, False, "loss"),
        ("kl", "wide", 1, True, True, "audit"),
        ("kl alone", "wide", 1, False, True, "loss"),
        ("some", "wide", 1, False, False, "loss"),
        ("next", "deep", 2, False, False, "loss"),
        ("z", "deep", 1, True, False, "audit"),
        ("z", "deep", 2, True, False, "audit"),
        ("z", "deep", 1, True, True, "backward"),
        ("kl", "deep", 2, True, False, "audit"),
    ],
)
def test_the_peak_of_a_step_is_that_of_the_allocator(
    models: dict[str, Path], qa_file: Path, tmp_path: Path, terms: str, shape: str,
    forwards: int, audited: bool, recomputed: bool, phase: str,
) -> None:  # fmt: skip
    rank = 32 if shape == "deep" else 4
    run = prepared_run(models[shape], qa_file, tmp_path / "run", terms, forwards, audited, r=rank)
    work = Work(run, None)
    policy = Recompute(work.model.layers if recomputed else 0)
    planned = planned_bytes(work, policy, forwards)
    real = real_peak(replace(run, recompute=policy), forwards, audited)
    assert max(planned, key=lambda name: planned[name]) == phase
    assert max(planned.values()) == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("recomputed", [False, True], ids=["none", "full"])
def test_the_peak_of_a_float8_step_is_that_of_the_allocator(
    models: dict[str, Path], qa_file: Path, tmp_path: Path, recomputed: bool
) -> None:
    """From the config alone; its products are emulated on a CPU."""
    run = prepared_run(models["deep"], qa_file, tmp_path / "run", "next", 1, False, r=32)
    run.config.training.compute = "fp8"
    work = Work(run, None)
    policy = Recompute(work.model.layers if recomputed else 0)
    planned = planned_bytes(work, policy, 1)
    option, rows = work.choose()
    record = work.record(option, rows)
    real = real_peak(replace(run, recompute=policy), 1, False)
    assert max(planned.values()) == pytest.approx(real, rel=0.03)
    assert record.basis_of["fp8"].startswith("every layer float8; fp8_keep: auto may keep some")
    assert "emulated in float32" in record.basis_of["seconds"]


def test_a_users_own_loss_is_said_to_be_unknown(
    models: dict[str, Path], qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never called by a plan: it may keep what it is given."""
    file = tmp_path / "mine.py"
    file.write_text("def loss(batch):\n    raise SystemExit('called')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    mine = {"name": "mine", "weight": 0.5, "function": "mine.py:loss"}
    for losses, more in (([{"name": "next_token"}, mine], False), ([mine], True)):
        config = tiny_run(models["deep"], qa_file, tmp_path / "run", losses=losses)
        work = Work(prepare(config, Choices(), QuietProgress()), None)
        option, rows = work.choose()
        (finding,) = work.record(option, rows).findings
        assert finding.code == "terms_not_planned"
        assert finding.severity == "warning"
        assert "what mine takes is not in the plan" in finding.message
        assert ("next token's loss in their place" in finding.message) == more


def test_how_a_built_in_term_was_planned_is_said(
    models: dict[str, Path], qa_file: Path, tmp_path: Path
) -> None:
    work = Work(prepared_run(models["deep"], qa_file, tmp_path / "run", "kl", 1, True), None)
    option, rows = work.choose()
    record = work.record(option, rows)
    assert record.findings == []
    assert record.basis_of["losses"].startswith("kl_to_base: their own operations traced")
    assert "audit" in [moment.phase for moment in record.moments]
