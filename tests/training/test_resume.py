"""Stop and go on: the same bits; and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import QuietProgress, StopAfter, events, last_weights, same_bits, tiny_run

from glasstune.core.config import Config
from glasstune.core.config_load import dump_config
from glasstune.core.errors import InputError, RunError, StoppedBySignal
from glasstune.workflows.train import train

# Dropout on, evaluation between, 3 epochs of 14 updates (the last one of an epoch short).
OPTIONS = {
    "adapter": {"lora_dropout": 0.3},
    "data": {"packing": False},
    "training": {"eval_steps": 3, "save_steps": 2, "learning_rate": 2e-3},
}


def config(model: Path, data: Path, output: Path, /, **changes) -> Config:
    sections = {name: {**values} for name, values in OPTIONS.items()}
    for name, values in changes.items():
        sections.setdefault(name, {}).update(values)
    return tiny_run(model, data, output, **sections)


@pytest.fixture(scope="module")
def whole(tiny_llama, qa_file, tmp_path_factory) -> Path:
    """The run that nobody stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    record = train(config(tiny_llama, qa_file, output), progress=QuietProgress())
    assert record.updates == 42
    return output


def stop(tiny_llama, qa_file, output: Path, updates: int, /, **changes) -> StoppedBySignal:
    with pytest.raises(StoppedBySignal) as caught:
        train(config(tiny_llama, qa_file, output, **changes), progress=StopAfter(updates))
    return caught.value


@pytest.mark.parametrize("updates", [1, 5, 14, 15, 33])
def test_c01_c02_c03_resume_gives_the_same_bits(
    tiny_llama, qa_file, tmp_path, whole, updates
) -> None:
    """Middle of an epoch, its border, after an evaluation; another number of workers."""
    output = tmp_path / "run"
    error = stop(tiny_llama, qa_file, output, updates)
    assert error.exit_code == 3
    assert str(updates) in error.message
    resumed = config(tiny_llama, qa_file, output, data={"num_workers": 2})
    record = train(resumed, resume=True, progress=QuietProgress())
    assert record.updates == 42
    assert same_bits(last_weights(output), last_weights(whole))
    mine, theirs = events(output, "train"), events(whole, "train")
    assert [row["loss"] for row in mine] == [row["loss"] for row in theirs]
    assert [row["eval_loss"] for row in events(output, "eval")] == [
        row["eval_loss"] for row in events(whole, "eval")
    ]
    assert {row["attempt"] for row in mine} == {1, 2}


def test_several_stops_and_recomputation(tiny_llama, qa_file, tmp_path, whole) -> None:
    output = tmp_path / "run"
    stop(tiny_llama, qa_file, output, 3)
    for _ in range(3):
        with pytest.raises(StoppedBySignal):
            train(config(tiny_llama, qa_file, output), resume=True, progress=StopAfter(7))
    train(
        config(tiny_llama, qa_file, output, training={"recompute": "full"}),
        resume=True, progress=QuietProgress(),
    )  # fmt: skip
    assert same_bits(last_weights(output), last_weights(whole))


def test_resume_from_an_older_step_sets_the_newer_aside(
    tiny_llama, qa_file, tmp_path, whole
) -> None:
    output = tmp_path / "run"
    stop(tiny_llama, qa_file, output, 9, training={"save_total_limit": None})
    progress = QuietProgress()
    train(
        config(tiny_llama, qa_file, output, training={"save_total_limit": None}),
        resume="step-4", progress=progress,
    )  # fmt: skip
    assert same_bits(last_weights(output), last_weights(whole))
    assert (output / "checkpoints" / "superseded" / "step-9").is_dir()
    assert any("step-9" in line for line in progress.lines)
    moved = (output / "metrics.superseded.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in moved} == set(range(5, 10))
    assert [row["step"] for row in events(output, "train")] == list(range(1, 43))


@pytest.mark.parametrize("name", ["optimizer.pt", "random.pt", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_c03_a_missing_or_damaged_part_is_named(tiny_llama, qa_file, tmp_path, name, how) -> None:
    output = tmp_path / "run"
    stop(tiny_llama, qa_file, output, 2)
    part = output / "checkpoints" / "step-2" / name
    content = part.read_bytes()
    part.unlink()
    if how == "cut":
        part.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError) as caught:
        train(config(tiny_llama, qa_file, output), resume=True, progress=QuietProgress())
    assert caught.value.code == "checkpoint_damaged"
    assert name in caught.value.message


def test_c05_a_folder_without_its_mark_is_passed_over(tiny_llama, qa_file, tmp_path, whole) -> None:
    """As a kill in the middle of a save would leave it, had it not been written aside."""
    output = tmp_path / "run"
    stop(tiny_llama, qa_file, output, 6)
    half = output / "checkpoints" / "step-7"
    shutil.copytree(output / "checkpoints" / "step-6", half)
    (half / "complete.json").unlink()
    (half / "optimizer.pt").write_bytes(b"half")
    leftover = output / "checkpoints" / ".step-8.1.tmp"
    leftover.mkdir()
    progress = QuietProgress()
    train(config(tiny_llama, qa_file, output), resume=True, progress=progress)
    assert any("step-7" in line and "mark" in line for line in progress.lines)
    assert not leftover.exists()
    assert same_bits(last_weights(output), last_weights(whole))


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"training": {"seed": 4}}, "resume_config", "training.seed"),
        ({"training": {"learning_rate": 1e-3}}, "resume_config", "training.learning_rate"),
        ({"adapter": {"r": 8}}, "resume_config", "adapter.r"),
        ({"data": {"max_length": 96}}, "resume_config", "data.max_length"),
        ({"losses": [{"name": "next_token", "weight": 2.0}]}, "resume_config", "weight"),
    ],
)
def test_another_config_is_refused_by_name(
    tiny_llama, qa_file, tmp_path, change, code, named
) -> None:
    output = tmp_path / "run"
    stop(tiny_llama, qa_file, output, 2)
    losses = change.pop("losses", None)
    changed = config(tiny_llama, qa_file, output, **change)
    if losses:
        changed = Config(**{**changed.model_dump(by_alias=True), "losses": losses})
    with pytest.raises(InputError) as caught:
        train(changed, resume=True, progress=QuietProgress())
    assert caught.value.code == code
    assert named in caught.value.message


def test_other_data_and_another_base_are_refused(tiny_llama, qa_file, tmp_path) -> None:
    from tiny import save_tiny_model

    output = tmp_path / "run"
    stop(tiny_llama, qa_file, output, 2)
    rows = json.loads(qa_file.read_text())
    rows[7]["output"] += "!"
    other = tmp_path / "qa.json"
    other.write_text(json.dumps(rows))
    with pytest.raises(InputError) as caught:
        train(config(tiny_llama, other, output), resume=True, progress=QuietProgress())
    assert caught.value.code == "resume_data"
    base = save_tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(InputError) as caught:
        train(config(base, qa_file, output), resume=True, progress=QuietProgress())
    assert caught.value.code == "resume_base"


def test_an_edited_loss_function_is_another_loss(tiny_llama, qa_file, tmp_path) -> None:
    output, file = tmp_path / "run", tmp_path / "my_loss.py"
    file.write_text("def loss(batch):\n    return batch.hidden.square().sum(), len(batch)\n")
    losses = [{"name": "next_token"}, {"name": "mine", "weight": 0.1, "function": f"{file}:loss"}]
    with pytest.raises(StoppedBySignal):
        train(tiny_run(tiny_llama, qa_file, output, losses=losses), progress=StopAfter(2))
    file.write_text(file.read_text().replace("square", "abs"))
    with pytest.raises(InputError) as caught:
        train(
            tiny_run(tiny_llama, qa_file, output, losses=losses),
            resume=True, progress=QuietProgress(),
        )  # fmt: skip
    assert caught.value.code == "resume_config"
    assert "losses.mine.code" in caught.value.message


def test_more_epochs_on_resume_are_allowed_and_said(tiny_llama, qa_file, tmp_path) -> None:
    output = tmp_path / "run"
    stop(tiny_llama, qa_file, output, 2)
    progress = QuietProgress()
    record = train(
        config(tiny_llama, qa_file, output, training={"num_train_epochs": 4}),
        resume=True, progress=progress,
    )  # fmt: skip
    assert record.updates == 56
    assert any("42" in line and "schedule" in line for line in progress.lines)


def test_run_folder_rules(tiny_llama, qa_file, tmp_path, whole) -> None:
    fresh = config(tiny_llama, qa_file, tmp_path / "none")
    with pytest.raises(InputError) as caught:
        train(fresh, resume=True, progress=QuietProgress())
    assert caught.value.code == "nothing_to_resume"
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "mine.txt").write_text("keep me")
    with pytest.raises(InputError) as caught:
        train(config(tiny_llama, qa_file, copy), progress=QuietProgress())
    assert caught.value.code == "output_exists"
    assert "--resume" in caught.value.fix
    assert "--overwrite" in caught.value.fix
    with pytest.raises(InputError) as caught:
        train(config(tiny_llama, qa_file, copy), resume="step-999", progress=QuietProgress())
    assert caught.value.code == "checkpoint_missing"
    short = config(tiny_llama, qa_file, copy, training={"max_steps": 2})
    train(short, overwrite=True, progress=QuietProgress())
    assert (copy / "mine.txt").read_text() == "keep me"
    assert [row["step"] for row in events(copy, "train")] == [1, 2]


def test_two_runs_never_share_a_folder(tiny_llama, qa_file, tmp_path) -> None:
    """A second process that trains into the folder is refused while the first one lives."""
    import fcntl

    output = tmp_path / "run"
    output.mkdir()
    script = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    script += "; print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(output / ".lock")], stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    with other.stdout:
        assert other.stdout.readline() == b"held\n"
    try:
        with pytest.raises(InputError) as caught:
            train(config(tiny_llama, qa_file, output), progress=QuietProgress())
        assert caught.value.code == "output_in_use"
    finally:
        other.kill()
        other.wait()
    short = config(tiny_llama, qa_file, output, training={"max_steps": 2})
    assert train(short, progress=QuietProgress()).updates == 2
    with (output / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and it is let go


def test_rotation_keeps_the_newest_and_the_best(tiny_llama, qa_file, tmp_path) -> None:
    output = tmp_path / "run"
    record = train(
        config(
            tiny_llama, qa_file, output,
            training={"save_steps": 1, "save_total_limit": 1, "learning_rate": 0.02,
                      "num_train_epochs": 5, "eval_steps": 5},
        ),
        progress=QuietProgress(),
    )  # fmt: skip
    left = {path.name for path in (output / "checkpoints").glob("step-*")}
    assert left == {f"step-{record.updates}", f"step-{record.best_step}"}
    run = json.loads((output / "run.json").read_text())
    assert run["adapter_checkpoint"] == f"step-{record.best_step}"


def test_a_killed_run_without_checkpoint_starts_again_and_says_so(
    tiny_llama, qa_file, tmp_path, whole
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    # As a kill before the first save leaves it.
    (output / "config.yaml").write_text(dump_config(config(tiny_llama, qa_file, output)))
    (output / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n{"event": "tr')
    progress = QuietProgress()
    train(config(tiny_llama, qa_file, output), resume=True, progress=progress)
    assert any("before its first complete checkpoint" in line for line in progress.lines)
    assert same_bits(last_weights(output), last_weights(whole))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_c06_a_full_disk_is_named_and_the_last_checkpoint_stays(
    tiny_llama, qa_file, tmp_path
) -> None:
    """A 1.5 MB disk: the second save does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode()}")
    try:
        output = disk / "run"
        with pytest.raises(RunError) as caught:
            train(
                config(
                    tiny_llama, qa_file, output,
                    training={"save_steps": 1, "save_total_limit": None},
                ),
                progress=QuietProgress(),
            )  # fmt: skip
        assert caught.value.code == "disk_full"
        assert "needs" in caught.value.message
        assert "free" in caught.value.message
        left = [path.name for path in (output / "checkpoints").iterdir()]
        assert "step-1" in left
        assert not [name for name in left if name.startswith(".")]
        for name in left:
            assert (output / "checkpoints" / name / "complete.json").is_file()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_optimizer_state_is_read_on_the_cpu(tmp_path, monkeypatch) -> None:
    """R02: resuming must not take GPU memory beside the live state."""
    from glasstune.training import checkpoint

    seen = []
    original = torch.load

    def spy(path, **options):
        seen.append(options)
        return original(path, **options)

    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(checkpoint.random_state(), tmp_path / "random.pt")
    monkeypatch.setattr(torch, "load", spy)
    monkeypatch.setattr(checkpoint, "load_tensors", lambda path: {})
    monkeypatch.setattr(checkpoint, "restore_state", lambda model, state: None)
    checkpoint.restore(tmp_path, torch.nn.Module(), optimizer)
    assert all(call == {"map_location": "cpu", "weights_only": True} for call in seen)
