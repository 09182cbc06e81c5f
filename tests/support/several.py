"""Several ranks of a run as processes of this machine, forked from one that has loaded the package.

A start of torchrun costs seconds of imports for each process; most tests need only what it puts
into the environment. Run as a script it is the process that forks.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import events, tiny_run

from glasstune.core.config_load import dump_config


@dataclass
class Ended:
    """How the ranks of a run ended.

    Args:
        codes: Exit codes, negative for a signal.
        logs: What each wrote to stderr.
    """

    codes: list[int]
    logs: list[str]

    @property
    def log(self) -> str:
        """All of it."""
        return "\n".join(self.logs)

    def errors(self) -> list[str]:
        """The lines that begin with `error:`, of all ranks."""
        return [line for line in self.log.splitlines() if line.startswith("error: ")]


class Several:
    """Starts ranks; one a test session.

    Args:
        folder: For their logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        self._forker = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._pids: list[int] = []

    def start(
        self,
        words: Sequence[str] | Sequence[Sequence[str]],
        count: int,
        *,
        only: Sequence[int] | None = None,
        patches: dict[int, str] | None = None,
        port: int | None = None,
        env: dict[str, str] | None = None,
        nodes: int = 1,
    ) -> list[int]:
        """Starts `glasstune` once for each rank.

        Args:
            words: Its arguments, the same for all or one list a rank.
            count: Ranks.
            only: Ranks that are really started; None = all.
            patches: Python code that a rank runs before.
            port: Where they meet; None finds a free one.
            env: More variables.
            nodes: Machines that they pretend to be on, with equal shares.

        Returns:
            Process ids, in the order of ranks.
        """
        place = str(port or free_port())
        each = count // nodes
        self._number += 1
        ranks: list[dict[str, Any]] = []
        for rank in range(count) if only is None else only:
            own = words if isinstance(words[0], str) else words[rank]
            variables = {
                "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank % each),
                "LOCAL_WORLD_SIZE": str(each), "GROUP_RANK": str(rank // each),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": place, **(env or {}),
            }  # fmt: skip
            log = str(self.folder / f"{self._number}-{rank}.log")
            patch = (patches or {}).get(rank, "")
            ranks.append({"words": list(own), "env": variables, "log": log, "patch": patch})
        self.logs = [rank["log"] for rank in ranks]
        self._send({"ranks": ranks})
        self._pids = self._read(60)["pids"]
        return self._pids

    def end(self, timeout: float = 60) -> Ended:
        """Waits for all of them; kills what is left after `timeout` seconds, and fails."""
        found = self._read(timeout)
        return Ended(found["codes"], [Path(log).read_text() for log in self.logs])

    def run(self, words: Any, count: int, *, timeout: float = 60, **options: Any) -> Ended:
        """`start` and `end`."""
        self.start(words, count, **options)
        return self.end(timeout)

    def _send(self, job: dict[str, Any]) -> None:
        assert self._forker.stdin is not None
        self._forker.stdin.write(json.dumps(job) + "\n")
        self._forker.stdin.flush()

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self._forker.stdout is not None
        ready, _, _ = select.select([self._forker.stdout], [], [], timeout)
        if not ready:
            for pid in self._pids:
                os.kill(pid, signal.SIGKILL)
            self._forker.stdout.readline()
            logs = "\n".join(Path(log).read_text()[-3000:] for log in self.logs)
            raise AssertionError(f"the ranks were still running after {timeout} s:\n{logs}")
        return json.loads(self._forker.stdout.readline())

    def close(self) -> None:
        """Ends the process that forks."""
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.close()
        self._forker.wait(10)
        self._forker.stdout.close()


# AdamW divides a gradient by its own size: of an entry that is nearly zero it makes a difference
# of up to 1e-4 out of a rounding of 1e-7, on one process with other micro-batches alike. With so
# large an epsilon its step is a multiple of the gradient, and what is seen is the sharing.
LINEAR = {"adam_epsilon": 1.0, "learning_rate": 0.2}
# 54 rows in updates of 4: the last of an epoch has 2, fewer than four ranks.


def written(model: Path, data: Path, output: Path, /, **changes: Any) -> Path:
    """The file of a configuration of 20 updates, 14 an epoch."""
    sections: dict[str, Any] = {
        "data": {"packing": False},
        "training": {
            "seed": 4, "max_steps": 20, "eval_steps": 5, "save_steps": 10,
            "per_device_train_batch_size": 1, "save_total_limit": None, **LINEAR,
        },
    }  # fmt: skip
    losses = changes.pop("losses", None)
    for name, values in changes.items():
        sections.setdefault(name, {}).update(values)
    if losses is not None:
        sections["losses"] = losses
    path = output.with_suffix(".yaml")
    path.write_text(dump_config(tiny_run(model, data, output, **sections)))
    return path


def steps(output: Path) -> list[tuple[int, int, int]]:
    return [(r["step"], r["tokens"], r["trained_tokens"]) for r in events(output, "train")]


def wait_for_steps(output: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        path = output / "metrics.jsonl"
        if path.exists() and path.read_text().count('"event": "train"') >= count:
            return
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _serve() -> None:
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from glasstune.cli import main
    from glasstune.workflows import train, trained_model  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        pids = [_fork(rank, main) for rank in json.loads(line)["ranks"]]
        print(json.dumps({"pids": pids}), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"codes": codes}), flush=True)


def _fork(rank: dict[str, Any], main: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    with Path(rank["log"]).open("w") as log:
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
    os.environ.update(rank["env"])
    code = 1
    try:
        exec(rank["patch"], {})
        code = main.run(rank["words"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
