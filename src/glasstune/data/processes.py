"""Several processes that work on pieces of the data.

They are started as plain commands and talk through pipes. Python's own `multiprocessing` would
either fork a process that already has threads, or run the user's script again in every worker.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any

from glasstune.core.errors import GlasstuneError, InputError, RunError
from glasstune.data.cache import Entry, Kept
from glasstune.data.chunks import Chunk
from glasstune.data.shards import batch_bytes, to_batch
from glasstune.data.work import Task, Worker

_START = "import sys; sys.path[:] = {path!r}; from glasstune.data.processes import serve; serve()"
_AHEAD = 2
"""Pieces that wait for each process, so that none is idle."""


@dataclass(frozen=True, slots=True)
class Job:
    """A piece to be worked on.

    Args:
        source: Index of its source.
        chunk: The piece.
        entry: Where its rows go.
    """

    source: int
    chunk: Chunk
    entry: Entry


def do(worker: Worker, job: Job) -> int:
    """Works on a piece and keeps its rows; returns how many were read.

    Raises:
        InputError: The file cannot be read any further, or the cache not be written.
        RunError: The disk is full.
    """
    chunk = job.chunk
    rows, tally = worker.work(job.source, chunk)
    # Names of files stay out of the cache, so that a file which is moved is found again.
    batch = to_batch(rows, keep_columns=worker.task.keep_columns, base=chunk.path)
    kept = Kept(len(rows), tally.moved(chunk.path, ""), chunk.file)
    job.entry.keep(chunk.number, batch_bytes(batch), kept)
    return tally.rows


class CannotSendError(Exception):
    """The tokenizer cannot be handed to another process; carries the reason."""


class Pool:
    """Processes that share the work.

    Args:
        task: What to do with rows.
        processes: How many.

    Raises:
        CannotSendError: The tokenizer cannot be pickled, or not be read by another process.
    """

    def __init__(self, task: Task, processes: int) -> None:
        try:
            spec = pickle.dumps(task)
        except Exception as error:  # a tokenizer's own Python code can fail in any way
            raise CannotSendError(f"{type(error).__name__}: {error}") from error
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="data")
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._all: list[subprocess.Popen[bytes]] = []
        self._ahead = processes * _AHEAD
        try:
            for _ in range(processes):
                self._all.append(_start())
            for process in self._all:
                self._greet(process, spec)
        except BaseException:
            self.close()
            raise

    def _greet(self, process: subprocess.Popen[bytes], spec: bytes) -> None:
        try:
            _send(process.stdin, spec)
            answer = _receive(process.stdout)
        except (OSError, EOFError) as error:
            raise CannotSendError("a process could not be started") from error
        if not isinstance(answer, int):
            raise CannotSendError(str(answer[1]))
        self._idle.put(process)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, int]]:
        """Yields each job with the rows it read when it is done, in order.

        Raises:
            GlasstuneError: What a process met, at its place in the order.
        """
        waiting: deque[tuple[Job, Future[int]]] = deque()
        for job in jobs:
            waiting.append((job, self._threads.submit(self._one, job)))
            if len(waiting) > self._ahead:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()

    def _one(self, job: Job) -> int:
        process = self._idle.get()
        try:
            _send(process.stdin, pickle.dumps(job))
            answer = _receive(process.stdout)
        except (OSError, EOFError) as error:
            self._idle.put(process)  # it answers no more; nobody shall wait for another
            raise RunError(
                "worker_died",
                f"a process that tokenises rows ended (exit code {process.wait()})",
                where=job.chunk.path,
                fix="most likely the memory was full; run again: what was finished is kept",
            ) from error
        self._idle.put(process)
        if isinstance(answer, int):
            return answer
        raise _error(answer)

    def close(self) -> None:
        """Ends the processes."""
        for process in self._all:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._all:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _start() -> subprocess.Popen[bytes]:
    # One thread each: as many processes as processors are at work already.
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _START.format(path=sys.path)]
    # Unbuffered here, so that a process which died cannot make closing its pipe fail.
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
    )


def _send(pipe: IO[bytes] | None, data: bytes) -> None:
    assert pipe is not None
    view = memoryview(len(data).to_bytes(8, "big") + data)
    while view:
        view = view[pipe.write(view) :]
    pipe.flush()


def _receive_bytes(pipe: IO[bytes] | None) -> bytes:
    assert pipe is not None
    size = int.from_bytes(_exactly(pipe, 8), "big")
    return _exactly(pipe, size)


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = pipe.read(size)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _receive(pipe: IO[bytes] | None) -> Any:
    return pickle.loads(_receive_bytes(pipe))


def _error(answer: tuple[Any, ...]) -> Exception:
    kind, *rest = answer
    if kind == "bug":
        return RuntimeError(f"in a process that tokenises rows:\n{rest[0]}")
    code, message, where, fix = rest
    return (InputError if kind == "input" else RunError)(code, message, where=where, fix=fix)


def serve() -> None:
    """Works on jobs from the standard input until it is closed; this is a worker's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    reading = os.fdopen(os.dup(0), "rb")
    writing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    try:
        worker = Worker(pickle.loads(_receive_bytes(reading)))
    except Exception as error:
        _send(writing, pickle.dumps(("bug", f"{type(error).__name__}: {error}")))
        return
    _send(writing, pickle.dumps(0))
    while True:
        try:
            job = pickle.loads(_receive_bytes(reading))
        except EOFError:
            return
        answer: int | tuple[Any, ...]
        try:
            answer = do(worker, job)
        except GlasstuneError as error:
            kind = "input" if isinstance(error, InputError) else "run"
            answer = (kind, error.code, error.message, error.where, error.fix)
        except Exception:
            answer = ("bug", traceback.format_exc())
        _send(writing, pickle.dumps(answer))
