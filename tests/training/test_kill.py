"""SIGKILL at random moments: the run goes on from its last checkpoint to the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import QuietProgress, events, last_weights, same_bits, tiny_run

from glasstune.core.config_load import dump_config
from glasstune.workflows.train import train

OPTIONS = {
    "adapter": {"lora_dropout": 0.3},
    "data": {"packing": False},
    "training": {"eval_steps": 7, "save_steps": 3, "num_train_epochs": 8},
}


def rows_written(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start(config: Path, *arguments: str) -> subprocess.Popen[bytes]:
    # One thread in every process: the number of threads is part of the bits.
    with config.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "glasstune", "train", str(config), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip


def kill_at(process: subprocess.Popen[bytes], output: Path, rows: int, delay: float) -> bool:
    """Waits for that many metric rows, a little longer, then kills; False if it ended before."""
    deadline = time.monotonic() + 90
    while process.poll() is None and rows_written(output) < rows:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.005)
    time.sleep(delay)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def killed_run_ends_alike(tiny_llama, qa_file, tmp_path, kills: int) -> None:
    whole, output = tmp_path / "whole", tmp_path / "killed"
    files = {}
    for folder in (whole, output):
        files[folder] = tmp_path / f"{folder.name}.yaml"
        files[folder].write_text(dump_config(tiny_run(tiny_llama, qa_file, folder, **OPTIONS)))
    assert start(files[whole]).wait() == 0
    dice = random.Random(5)
    total = rows_written(whole)
    done = 0
    arguments: tuple[str, ...] = ()
    while done < kills:
        # A resumed run drops rows past its checkpoint: count from what a start would keep.
        target = min(total - 5, (done + 1) * total // (kills + 1))
        process = start(files[output], *arguments)
        if kill_at(process, output, target, dice.random() * 0.08):
            done += 1
        arguments = ("--resume",)
    code = start(files[output], "--resume").wait()
    assert code == 0, files[output].with_suffix(".log").read_text()
    assert same_bits(last_weights(output), last_weights(whole))
    steps = [row["step"] for row in events(output, "train")]
    assert steps == sorted(set(steps))
    assert len(steps) == len(events(whole, "train"))
    superseded = output / "metrics.superseded.jsonl"  # absent where no kill came after a save
    text = superseded.read_text() if superseded.exists() else ""
    lost = [json.loads(line)["step"] for line in text.splitlines() if '"train"' in line]
    assert len(lost) <= kills * OPTIONS["training"]["save_steps"]


def test_one_kill(tiny_llama, qa_file, tmp_path) -> None:
    killed_run_ends_alike(tiny_llama, qa_file, tmp_path, kills=1)


@pytest.mark.slow(reason="twelve processes, each importing torch and transformers")
@pytest.mark.timeout(900)
def test_ten_kills(tiny_llama, qa_file, tmp_path) -> None:
    killed_run_ends_alike(tiny_llama, qa_file, tmp_path, kills=10)


def test_c05_a_kill_in_the_middle_of_a_save(tiny_llama, qa_file, tmp_path, monkeypatch) -> None:
    """The process dies between any two file operations of the third save."""
    from glasstune.training import checkpoint

    class Dead(BaseException):
        pass

    short = {**OPTIONS, "training": {"eval_steps": 7, "save_steps": 3, "num_train_epochs": 1}}
    reference = tmp_path / "whole"
    train(tiny_run(tiny_llama, qa_file, reference, **short), progress=QuietProgress())
    for number, name in enumerate(("_write_state", "sha256_file", "fsync_tree", "fsync_path")):
        output = tmp_path / name
        original = getattr(checkpoint, name)
        calls = {"left": (5, 12, 3, 3)[number]}

        def die(*arguments, original=original, calls=calls):
            calls["left"] -= 1
            if calls["left"] == 0:
                # A real kill leaves the folder written aside as it is.
                monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
                raise Dead
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, die)
            with pytest.raises(Dead):
                train(tiny_run(tiny_llama, qa_file, output, **short), progress=QuietProgress())
        monkeypatch.undo()
        train(
            tiny_run(tiny_llama, qa_file, output, **short),
            resume=True, progress=QuietProgress(),
        )  # fmt: skip
        assert same_bits(last_weights(output), last_weights(reference)), name
        assert not list((output / "checkpoints").glob(".*"))
