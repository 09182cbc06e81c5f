"""`glasstune plan` of float8 products, and as a way that is offered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import QuietProgress, tiny_run
from tiny import save_tiny_model

from glasstune.core.choices import Choices
from glasstune.workflows import plan_fp8
from glasstune.workflows.plan import plan
from glasstune.workflows.plan_work import Work
from glasstune.workflows.prepare_run import prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=3)


def configured(model: Path, data: Path, output: Path, bits: int, **training: Any) -> Any:
    options = {"dtype": "bfloat16", "bits": bits}
    return tiny_run(model, data, output, model=options, training=training)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_config_alone_is_planned(model: Path, qa_file: Path, tmp_path: Path, bits: int) -> None:
    plain = plan(configured(model, qa_file, tmp_path / "a", bits), progress=QuietProgress())
    fp8 = plan(
        configured(model, qa_file, tmp_path / "b", bits, compute="fp8"), progress=QuietProgress()
    )
    assert "fp8" not in plain.basis_of
    how = "expanded to e4m3 in each pass" if bits < 16 else "two e4m3 copies"
    assert how in fp8.basis_of["fp8"]
    assert fp8.seconds_per_update > 0
    # Two e4m3 copies are as large as one 16-bit weight; scales and LoRA's columns come on top.
    by_phase = [{m.phase: m.parts["base"] for m in one.moments} for one in (plain, fp8)]
    assert by_phase[1]["forward"] > by_phase[0]["forward"] or bits == 16
    assert by_phase[1]["load"] >= by_phase[0]["load"]
    # A CPU has no float8 products: nothing is advised.
    assert all("training.compute" not in item.change for item in plain.alternatives)


def test_layers_that_are_kept_are_counted_as_they_are(
    model: Path, qa_file: Path, tmp_path: Path
) -> None:
    sizes = []
    for keep in ([], ["*.mlp.*"]):
        config = configured(model, qa_file, tmp_path / "run", 16, compute="fp8", fp8_keep=keep)
        work = Work(prepare(config, Choices(), QuietProgress()), None)
        sizes.append(work.model.static.base)
    # The scales of gate, up (64 -> 128) and down (128 -> 64) of three layers.
    assert sizes[0] - sizes[1] == 3 * 3 * 4 * (64 + 128)


def test_a_device_that_has_float8_is_offered_it(
    model: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_fp8, "_has_fp8", lambda: True)
    config = configured(model, qa_file, tmp_path / "run", 16)
    work = Work(prepare(config, Choices(), QuietProgress()), None)
    _, rows = work.choose()
    assert plan_fp8.with_fp8(work, rows) is None  # a CPU
    work.device.kind, work.device.fast = "cuda", True
    found = plan_fp8.with_fp8(work, rows)
    assert found is not None
    alternative, finding = found
    assert alternative.change == {"training.compute": "fp8"}
    assert alternative.peak_bytes > 0
    assert alternative.seconds_per_update > 0
    assert (finding.code, finding.severity) == ("fp8_rounds_more", "info")
    assert "round more than bfloat16" in finding.message
    for other in ({"compute": "fp8"}, {}):
        again = configured(model, qa_file, tmp_path / "run", 16 if other else 4, **other)
        refused = Work(prepare(again, Choices(), QuietProgress()), None)
        refused.device.kind, refused.device.fast = "cuda", True
        assert plan_fp8.with_fp8(refused, rows) is None
    monkeypatch.setattr(plan_fp8, "_has_fp8", lambda: False)
    assert plan_fp8.with_fp8(work, rows) is None
