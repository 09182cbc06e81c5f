"""`glasstune plan` and the plan inside training, on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QuietProgress, tiny_run

from glasstune.core.choices import Choices
from glasstune.core.config_load import config_from_mapping
from glasstune.core.errors import InputError
from glasstune.core.plan import PARTS
from glasstune.core.recompute import Recompute
from glasstune.workflows import plan as plan_module
from glasstune.workflows.plan import plan, plan_run, plan_start, small
from glasstune.workflows.plan_batch import largest_batch, longest_rows
from glasstune.workflows.plan_measure import compared, dry_step
from glasstune.workflows.prepare_run import prepare
from glasstune.workflows.train import train
from glasstune.workflows.trained_model import open_trained


def planned(config: Any) -> Any:
    return plan_run(prepare(config, Choices(), QuietProgress()), QuietProgress())


def test_the_record_adds_up(tiny_llama: Path, qa_file: Path, tmp_path: Path) -> None:
    record = plan(tiny_run(tiny_llama, qa_file, tmp_path / "run"), progress=QuietProgress())
    assert record.peak_bytes == sum(record.parts.values())
    assert record.peak_bytes == max(moment.bytes for moment in record.moments)
    assert all(set(moment.parts) == set(PARTS) for moment in record.moments)
    assert record.basis == "estimate"
    assert record.fits
    assert record.measured_peak_bytes is None
    # All of the folder's weights, float32 as the folder stores them.
    real = sum(
        value.numel() * 4 for value in _weights(tiny_llama).values() if value.is_floating_point()
    )
    assert record.parts["base"] == pytest.approx(real, rel=0.01)
    content = record.to_dict()
    for key in ("peak_bytes", "parts", "recompute_layers", "reason", "updates", "alternatives"):
        assert key in content


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from glasstune.core.tensors import load_tensors

    return load_tensors(folder / "model.safetensors")


def test_a_run_that_cannot_fit_is_refused_before_loading(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glasstune.models.load.load_base", _never)
    run = tiny_run(tiny_llama, qa_file, tmp_path / "run", training={"max_memory": "20MiB"})
    with pytest.raises(InputError) as caught:
        train(run, progress=QuietProgress())
    assert caught.value.code == "does_not_fit"
    assert "20.0 MiB may be used (training.max_memory)" in caught.value.message
    assert caught.value.fix.count("; or ") == 2
    assert "model.bits: 4" in caught.value.fix


def test_a_refused_start_leaves_nothing_new(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glasstune.workflows.plan_ways._ways_out", lambda *_: [])  # takes seconds

    def refused(output: Path) -> None:
        run = tiny_run(tiny_llama, qa_file, output, training={"max_memory": "20MiB"})
        with pytest.raises(InputError, match="may be used"):
            train(run, progress=QuietProgress())

    refused(tmp_path / "new" / "er")
    assert list(tmp_path.iterdir()) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("kept", encoding="utf-8")
    refused(mine)
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    refused(mine / "inside")
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_a_lock_that_was_just_taken_away_is_no_lock(tmp_path: Path) -> None:
    """Between the opening of the file and its lock another start may fail and remove it."""
    from glasstune.workflows import run_folder

    real = run_folder._opened

    def slow(path: Path) -> Any:
        file = real(path)
        path.unlink()
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "_opened", slow)
        with (
            pytest.raises(InputError, match="another run is writing"),
            run_folder.sole_writer(tmp_path, Choices()),
        ):
            _never()
    with (
        run_folder.sole_writer(tmp_path, Choices()),
        pytest.raises(InputError, match="another run is writing"),
        run_folder.sole_writer(tmp_path, Choices()),
    ):
        _never()


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("weights were loaded")


def test_a_tight_limit_has_layers_recomputed(
    tiny_llama: Path, qa_file: Path, tmp_path: Path
) -> None:
    def run(limit: str | None) -> Any:
        training = {"train_batch_size": 8, "per_device_train_batch_size": 8}
        if limit is not None:
            training["max_memory"] = limit
        data = {"packing": False}
        return tiny_run(tiny_llama, qa_file, tmp_path / "run", training=training, data=data)

    free = planned(run(None)).record
    assert free.recompute_layers == 0
    full = min(a.peak_bytes for a in free.alternatives if "training.recompute" in a.change)
    assert full < free.peak_bytes
    between = (full + free.peak_bytes) // 2
    context = free.parts["context"]
    found = None
    for _ in range(3):  # what the process holds may have grown since
        grown = planned(run(None)).record.parts["context"] - context
        found = planned(run(str(between + grown)))
        if found.record.fits:
            break
    assert found is not None
    assert found.record.fits
    assert found.recompute.layers > 0
    assert "layers computed again" in found.record.reason


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_make_again_what_is_cheap_where_memory_asks(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._functorch.config as functorch

    from glasstune.fast import compile
    from glasstune.workflows import plan_work

    monkeypatch.setattr(compile, "_missing_compiler", lambda _: None)
    training = {"train_batch_size": 8, "per_device_train_batch_size": 8, "compile": True}
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run", training=training)
    prepared = prepare(config, Choices(), QuietProgress())
    work = plan_work.Work(prepared, None)
    work.device.bandwidth = 1e12
    free = work.options(8)
    assert {option.recompute.budget for option in free} == {1.0}
    work.limit = free[0].peak - 1
    option, rows = work.choose()
    assert option.peak <= work.limit
    assert rows == 8
    assert option.recompute == Recompute(budget=option.recompute.budget)
    assert option.recompute.budget < 1
    ready = replace(prepared, recompute=option.recompute)
    before = functorch.activation_memory_budget
    adapted, *_ = open_trained(ready, lambda _: None)
    assert functorch.activation_memory_budget == option.recompute.budget
    adapted.slow_down()
    assert functorch.activation_memory_budget == before


def test_auto_rows_get_smaller_where_memory_asks(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glasstune.workflows import plan_work

    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run",
        training={
            "train_batch_size": 8, "per_device_train_batch_size": "auto", "recompute": "none",
        },
        data={"max_length": 128, "packing": False},
    )  # fmt: skip
    prepared = prepare(config, Choices(), QuietProgress())
    work = plan_work.Work(prepared, None)
    most = prepared.schedule.micro
    assert work.row_numbers()[0] == most > 1
    work.limit = work.peak(most, Recompute()).bytes - 1
    option, rows = work.choose()
    assert rows < most
    assert option.peak <= work.limit


def test_the_longest_rows_are_found(tiny_llama: Path, qa_file: Path, tmp_path: Path) -> None:
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run", data={"packing": False})
    data = prepare(config, Choices(), QuietProgress()).data.train
    lengths = [len(data.documents[index]) for index in range(data.rows)]
    top = longest_rows(data, 3)
    assert [lengths[row] for row in top] == sorted(lengths, reverse=True)[:3]
    assert largest_batch(data, 3, 0).input_ids.shape[1] >= max(lengths)


@pytest.mark.parametrize("terms", [["next_token"], ["next_token", "kl_to_base"]])
def test_measuring_changes_nothing(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, terms: list[str]
) -> None:
    """Also where an update is audited by term, and has several forwards."""
    training = {"train_batch_size": 4, "per_device_train_batch_size": 2}
    losses = [{"name": name} for name in terms]
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run", training=training, losses=losses)
    found = planned(config)
    adapted, parameters, optimizer = open_trained(found.prepared, lambda *_: None)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    adapted.model.eval()
    random = torch.get_rng_state()
    seconds = dry_step(found, adapted, optimizer)
    assert seconds > 0
    assert torch.equal(random, torch.get_rng_state())
    assert not adapted.model.training
    for name, value in parameters.items():
        assert value.grad is None
        assert torch.equal(value, before[name]), name


def test_measure_puts_the_real_peak_beside_the_plan(
    tiny_llama: Path, qa_file: Path, tmp_path: Path
) -> None:
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run")
    record = plan(config, measure=True, progress=QuietProgress())
    assert record.basis == "measured"
    assert record.measured_peak_bytes is not None
    assert record.error == pytest.approx(record.peak_bytes / record.measured_peak_bytes - 1)
    assert not (tmp_path / "run").exists()


def test_a_measured_rate_holds_for_the_other_ways(
    tiny_llama: Path, qa_file: Path, tmp_path: Path
) -> None:
    found = planned(tiny_run(tiny_llama, qa_file, tmp_path / "run"))
    before, device = found.record, torch.device("cpu")
    rows, batch = found.prepared.schedule.micro, found.prepared.schedule.batch
    after = compared(found, device, 100 * before.seconds_per_update * rows / batch)
    assert before.alternatives
    for was, now in zip(before.alternatives, after.alternatives, strict=True):
        assert now.seconds_per_update == pytest.approx(100 * was.seconds_per_update)
        assert now.total_seconds == pytest.approx(100 * was.total_seconds)


def test_a_peak_of_loading_is_compared_too(tiny_llama: Path, qa_file: Path, tmp_path: Path) -> None:
    found = planned(tiny_run(tiny_llama, qa_file, tmp_path / "run"))
    load = found.record.moments[0]
    assert load.phase == "load"
    record = replace(found.record, parts=load.parts, phase="load", peak_bytes=load.bytes)
    after = compared(replace(found, record=record), torch.device("cpu"), 1.0)
    assert after.measured_peak_bytes
    assert set(record.parts) == set(PARTS)


def test_a_longer_limit_is_advice_only_where_it_makes_rows_longer(
    tiny_llama: Path, qa_file: Path, tmp_path: Path
) -> None:
    def lengths(**data: Any) -> list[int]:
        record = plan(
            tiny_run(tiny_llama, qa_file, tmp_path / "run", data=data), progress=QuietProgress()
        )
        changes = [other.change.get("data.max_length") for other in record.alternatives]
        return sorted(length for length in changes if length is not None)

    assert lengths(max_length=128) == [64, 256]
    assert lengths(max_length=512) == [256]  # the model has 512 positions
    single = lengths(max_length=256, packing=False)
    assert all(length < 256 for length in single)


def test_offload_on_a_cpu_is_said(tiny_llama: Path, qa_file: Path, tmp_path: Path) -> None:
    training = {"recompute": "offload"}
    prepared = prepare(
        tiny_run(tiny_llama, qa_file, tmp_path / "run", training=training),
        Choices(), QuietProgress(),
    )  # fmt: skip
    found = plan_start(prepared, QuietProgress(), 3, always=True)
    assert found is not None
    assert [finding.code for finding in found.record.findings] == ["offload_is_full"]
    assert prepared.config.training.recompute == "full"
    choice = prepared.choices.get("training.recompute")
    assert choice is not None
    assert choice.value == "full"
    assert "offload asked for" in choice.reason


def test_small_runs_need_no_plan_and_a_failed_plan_is_said(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run")
    prepared = prepare(config, Choices(), QuietProgress())
    assert small(prepared)
    assert plan_start(prepared, QuietProgress(), 3) is None

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a family that is unlike all others")

    monkeypatch.setattr(plan_module, "plan_run", broken)
    assert plan_start(prepared, QuietProgress(), 3, always=True) is None
    said = prepared.choices.get("plan")
    assert said is not None
    assert said.reason.startswith("warning: KeyError")
    assert "max_memory" not in said.reason


def test_a_planner_that_breaks_stops_no_run_and_shows_its_traceback(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glasstune.workflows import plan_work

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a family that is unlike all others")

    monkeypatch.setattr(plan_work, "_setup", broken)
    training = {"max_steps": 1, "max_memory": "100GiB"}
    progress = QuietProgress()
    run = tiny_run(tiny_llama, qa_file, tmp_path / "run", training=training)
    assert train(run, progress=progress).updates == 1
    said = "\n".join(progress.lines)
    assert "Traceback" in said
    assert "in broken" in said
    assert "a bug of Glasstune" in said
    assert "nothing keeps the run within 100GiB" in said
    with pytest.raises(KeyError):  # asked for alone, the plan's fault is an error
        plan(run, progress=QuietProgress())


def test_training_is_the_same_with_and_without_a_plan(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glasstune.core.tensors import load_tensors

    def trained(name: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        train(
            tiny_run(tiny_llama, qa_file, folder, training={"max_steps": 2}),
            progress=QuietProgress(),
        )
        return load_tensors(folder / "adapter" / "adapter_model.safetensors")

    without = trained("without")
    monkeypatch.setattr(plan_module, "SMALL", 0)
    with_plan = trained("with")
    assert without.keys() == with_plan.keys()
    for name, value in without.items():
        assert torch.equal(value, with_plan[name]), name


def test_a_config_from_a_mapping_is_planned(tiny_llama: Path, qa_file: Path) -> None:
    config = config_from_mapping(
        {"model": {"path": str(tiny_llama), "bits": 4, "device": "cpu"},
         "data": {"sources": [{"path": str(qa_file)}], "validation_split": 0.0}}
    ).config  # fmt: skip
    record = plan(config, progress=QuietProgress())
    assert record.bits == 4
    assert record.evaluation_seconds == 0


def test_a_resumed_run_keeps_the_rows_that_it_began_with(
    tiny_llama: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a forward are chosen by what is free; a checkpoint belongs to them."""
    from glasstune.workflows import plan_work

    def run(steps: int) -> Any:
        return tiny_run(
            tiny_llama, qa_file, tmp_path / "run",
            training={"max_steps": steps, "save_steps": 1, "train_batch_size": 8},
            data={"packing": False},
        )  # fmt: skip

    monkeypatch.setattr(plan_module, "SMALL", 0)
    real = plan_work.Work.choose

    def tight(self: Any) -> Any:
        rows = self.row_numbers()
        return real(self) if len(rows) == 1 else (self.options(2)[0], 2)

    monkeypatch.setattr(plan_work.Work, "choose", tight)
    train(run(2), progress=QuietProgress())
    monkeypatch.setattr(plan_work.Work, "choose", real)
    assert train(run(4), resume=True, progress=QuietProgress()).updates == 4
