"""Runs that torchrun starts: one machine, two, killed and started again; `--nproc`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import distance, events, last_weights
from several import free_port, steps, wait_for_steps, written

from glasstune.cli import main as cli
from glasstune.core.errors import InputError
from glasstune.workflows.ranks import device_count

SLOW = pytest.mark.slow(reason="torchrun imports everything anew in each of its processes")


def start(*words: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *words], stdout=file, stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def torchrun(*options: str, config: Path, log: Path) -> subprocess.Popen[bytes]:
    return start(
        "torch.distributed.run", *options, "-m", "glasstune", "train", str(config), log=log
    )


@pytest.fixture(scope="module")
def one(tiny_llama, qa_file, several, tmp_path_factory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    config = written(tiny_llama, qa_file, output)
    assert several.run(["train", str(config)], 1).codes == [0]
    return output


@SLOW
def test_nproc_starts_torchrun_and_gives_the_record_of_rank_0(
    tiny_llama, qa_file, tmp_path, one
) -> None:
    output, log, record = tmp_path / "run", tmp_path / "log", tmp_path / "record.json"
    config = written(tiny_llama, qa_file, output)
    words = ["glasstune", "train", str(config), "--nproc", "2", "--json", str(record)]
    assert start(*words, log=log).wait(60) == 0, log.read_text()
    assert distance(last_weights(output), last_weights(one)) <= 1e-6
    assert steps(output) == steps(one)
    assert json.loads(record.read_text())["updates"] == 20
    assert json.loads((output / "run.json").read_text())["ranks"]["count"] == 2


@SLOW
def test_nproc_keeps_the_exit_codes(tiny_llama, qa_file, tmp_path) -> None:
    """2 for a mistake, 3 for a signal to the command itself; then it goes on."""
    output, log = tmp_path / "run", tmp_path / "log"
    config = written(tiny_llama, qa_file, output, training={"max_steps": 2000})
    words = ["glasstune", "train", str(config), "--nproc=2"]
    assert start(*words, "training.lerning_rate=1", log=log).wait(60) == 2
    assert log.read_text().count("error: ") == 1
    process = start(*words, log=log)
    wait_for_steps(output, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3, log.read_text()
    done = len(events(output, "train"))
    assert (output / "checkpoints" / f"step-{done}" / "complete.json").is_file()
    more = f"training.max_steps={done + 2}"
    assert start(*words, "--resume", more, log=log).wait(60) == 0, log.read_text()
    assert [step for step, _, _ in steps(output)] == list(range(1, done + 3))


@SLOW
@pytest.mark.parametrize("ranks", [2, 4])
def test_torchrun_on_one_machine(tiny_llama, qa_file, tmp_path, one, ranks) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    config = written(tiny_llama, qa_file, output)
    options = ("--standalone", f"--nproc-per-node={ranks}")
    assert torchrun(*options, config=config, log=log).wait(100) == 0, log.read_text()
    assert distance(last_weights(output), last_weights(one)) <= 1e-6


@SLOW
@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_torchrun_on_two_machines(tiny_llama, qa_file, tmp_path, one, backend) -> None:
    """Two torchruns on this machine that meet at a port, as two machines would."""
    output = tmp_path / "run"
    config = written(tiny_llama, qa_file, output)
    port = free_port()
    nodes = []
    for node in range(2):
        options = [
            "--nnodes=2", "--nproc-per-node=2", f"--rdzv-backend={backend}", "--rdzv-id=job",
            f"--rdzv-endpoint=127.0.0.1:{port}",
        ]  # fmt: skip
        if backend == "static":
            options = [
                "--nnodes=2", "--nproc-per-node=2", f"--node-rank={node}",
                "--master-addr=127.0.0.1", f"--master-port={port}",
            ]  # fmt: skip
        nodes.append(torchrun(*options, config=config, log=tmp_path / f"log{node}"))
    logs = [node.wait(100) for node in nodes]
    assert logs == [0, 0], (tmp_path / "log0").read_text()
    assert distance(last_weights(output), last_weights(one)) <= 1e-6
    ranks = json.loads((output / "run.json").read_text())["ranks"]
    assert ranks["count"] == 4
    assert len(ranks["hosts"]) == 4


def workers(process: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of torchrun's own children that train, lowest rank first."""
    found: list[tuple[int, int]] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
        if parent == process.pid and ranks:
            found.append((ranks[0], int(folder.name)))
    return [pid for _, pid in sorted(found)]


@SLOW
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_a_killed_run_again_from_its_last_checkpoint(
    tiny_llama, qa_file, tmp_path, victim
) -> None:
    """The words of the command are the first start's: `--overwrite` does not cost the run."""
    output, log = tmp_path / "run", tmp_path / "log"
    training = {"max_steps": 60, "save_steps": 3, "lr_scheduler_type": "constant"}
    config = written(tiny_llama, qa_file, output, training=training)
    options = (
        "--standalone", "--nproc-per-node=2", "--max-restarts=2", "-m", "glasstune", "train",
        str(config), "--overwrite",
    )  # fmt: skip
    process = start("torch.distributed.run", *options, log=log)
    wait_for_steps(output, 10)
    os.kill(workers(process)[victim], signal.SIGKILL)
    assert process.wait(120) == 0, log.read_text()
    text = log.read_text()
    assert "torchrun has started the run again" in text
    assert "goes on after update" in text
    assert [step for step, _, _ in steps(output)] == list(range(1, 61))
    assert {row["attempt"] for row in events(output, "train")} == {1, 2}


@SLOW
def test_a_killed_machine_ends_the_other_within_a_minute(tiny_llama, qa_file, tmp_path) -> None:
    """The second torchrun and its processes die at once; nobody tells the first."""
    output = tmp_path / "run"
    config = written(tiny_llama, qa_file, output, training={"max_steps": 5000, "save_steps": 2})
    port = free_port()
    nodes = []
    for node in range(2):
        options = (
            "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}", "--master-addr=127.0.0.1",
            f"--master-port={port}",
        )  # fmt: skip
        nodes.append(torchrun(*options, config=config, log=tmp_path / f"log{node}"))
    wait_for_steps(output, 5)
    (other,) = workers(nodes[1])
    os.kill(nodes[1].pid, signal.SIGKILL)
    os.kill(other, signal.SIGKILL)
    started = time.monotonic()
    assert nodes[0].wait(100) == 1
    assert time.monotonic() - started < 60
    nodes[1].wait(10)
    text = (tmp_path / "log0").read_text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "rank 1 on" in errors[0]
    assert "is gone" in errors[0]


@pytest.mark.parametrize(
    ("asked", "variables", "code"),
    [
        ("0", {}, "bad_nproc"),
        ("two", {}, "bad_nproc"),
        (
            "2",
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "nproc_inside_torchrun",
        ),
    ],
)
def test_nproc_that_makes_no_sense(asked, variables: dict[str, Any], code) -> None:
    with pytest.raises(InputError) as caught:
        device_count(asked, variables)
    assert caught.value.code == code


def test_all_devices_of_a_machine_without_gpu_are_one() -> None:
    assert device_count("all", {}) == 1
    assert device_count("3", {}) == 3


def test_nproc_of_one_starts_nothing(capsys) -> None:
    assert cli.run(["train", "nowhere.yaml", "--nproc", "1"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
