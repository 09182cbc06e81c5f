"""How the processes of a run find each other, and how one learns that another is gone.

All talk to one small store, which torchrun keeps (or rank 0). Each writes a heartbeat there from a
thread of its own and reads those of the others, so a process that was killed or whose machine is
unreachable is noticed within `LOST_SECONDS`, whatever the collective's own timeout is. A process
that fails says why in the store; the others end with its name and its words.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from glasstune.core.errors import GlasstuneError, RunError
from glasstune.core.ranks import Rank

_c10d: Any = dist  # its stores are exported by no name that a type checker sees

BEAT_SECONDS = 1.0
LOST_SECONDS = 25.0
"""Silence after which a process counts as gone."""
GRACE_SECONDS = 15.0
"""What the main thread gets to end by itself, once another process is known to be gone."""
HURRY_SECONDS = 6.0
"""The same once a signal has come: torchrun sends one when a process dies, and kills 30 s later."""
_LOOK_SECONDS = 3.0
"""How long a failed collective waits for the reason."""
_DONE = "done"
_OF_OTHERS = ("peer_lost", "peer_failed", "collective_failed")
_RESUME = "start the same command again with --resume; torchrun --max-restarts N does it by itself"


class Peers:
    """The other processes of a run.

    Args:
        rank: This process.
        timeout: Seconds to wait for the others at the start.
        session: Number of this run in the process.

    Raises:
        RunError: `master_unreachable`.
    """

    def __init__(self, rank: Rank, timeout: float, session: int = 0) -> None:
        self.rank = rank
        self.timeout = timeout
        self.hosts: dict[int, str] = {rank.index: socket.gethostname()}
        self.nodes: dict[int, int] = {rank.index: rank.node}
        self._prefix = f"glasstune/{rank.restart}/{session}"
        self._hosts_it = rank.index == 0 and not rank.agent and not dist.is_initialized()
        self._keeper = self._connect(timeout, self._hosts_it)
        self.store = _c10d.PrefixStore(self._prefix, self._keeper)
        self._own = _c10d.PrefixStore(self._prefix, self._connect(30.0))  # the thread's
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._heard: dict[int, tuple[str, float]] = {}
        self._signals: tuple[int, int] | None = None
        self._before: Any = signal.SIG_DFL
        self._hurry = False

    def _connect(self, timeout: float, hosts_it: bool = False) -> Any:
        limit = timedelta(seconds=timeout)
        try:
            return _c10d.TCPStore(
                self.rank.address, self.rank.port, None, hosts_it, limit,
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except (RuntimeError, ValueError, OSError) as error:
            place = f"{self.rank.address}:{self.rank.port}"
            raise RunError(
                "master_unreachable",
                f"rank {self.rank.index} on {socket.gethostname()} could not reach the meeting "
                f"place {place} within {timeout:g} s ({_first_line(error)})",
                where="MASTER_ADDR, MASTER_PORT",
                fix="check the address, the port and the firewall between the machines, and that "
                "every machine was started",
            ) from None

    def within(self, name: str) -> Any:
        """Returns a part of the store, for torch's own use."""
        return _c10d.PrefixStore(name, self.store)

    def give_up(self, hello: Mapping[str, Any], error: GlasstuneError) -> None:
        """Says `hello` with the error in it, and ends."""
        self.store.set(f"beat/{self.rank.index}", _DONE)
        mine = {**hello, "host": socket.gethostname(), "node": self.rank.node}
        self.store.set(f"hello/{self.rank.index}", json.dumps(mine))
        for index in range(self.rank.index):  # a lower rank that says the same speaks for both
            try:
                self.store.wait([f"hello/{index}"], timedelta(seconds=10))
            except RuntimeError:
                continue
            other = json.loads(self.store.get(f"hello/{index}"))
            error.said |= other.get("error") == mine["error"] and other["host"] == mine["host"]
        if self._hosts_it:
            time.sleep(_LOOK_SECONDS)  # the store goes with this process

    def meet(self, hello: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Exchanges what each process says of itself, then begins to watch.

        Args:
            hello: Plain values.

        Returns:
            Everybody's, in the order of ranks.

        Raises:
            RunError: `peer_missing`: names who did not come.
        """
        mine = {**hello, "host": socket.gethostname(), "node": self.rank.node}
        self.store.set(f"beat/{self.rank.index}", "0")
        self.store.set(f"hello/{self.rank.index}", json.dumps(mine))
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + self.timeout
        for index in range(self.rank.count):
            left = max(0.1, deadline - time.monotonic())
            try:
                self.store.wait([f"hello/{index}"], timedelta(seconds=left))
                found.append(json.loads(self.store.get(f"hello/{index}")))
            except RuntimeError:
                raise self._missing(index) from None
        for index, one in enumerate(found):
            if "error" in one:
                self.hosts[index], self.nodes[index] = str(one["host"]), int(one["node"])
                raise self._of_failure(index, one["error"])
        self.hosts = {index: str(one["host"]) for index, one in enumerate(found)}
        self.nodes = {index: int(one["node"]) for index, one in enumerate(found)}
        self._hear_signals()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()
        return found

    def _hear_signals(self) -> None:
        """Has the thread told of signals that the main thread, in a collective, cannot see."""
        if threading.current_thread() is threading.main_thread():
            self._signals = os.pipe2(os.O_NONBLOCK)
            signal.set_wakeup_fd(self._signals[1], warn_on_full_buffer=False)
            self._before = signal.signal(signal.SIGTERM, self._terminated)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM while nothing is trained yet: there is nothing to save, only something to say.

        torchrun sends it as well when another process has died, say while it read the weights.
        """
        error = self.explained(RuntimeError("SIGTERM"))
        if error.code == "collective_failed":  # nobody is gone: it is meant for this process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        _say(error)
        os._exit(error.exit_code)

    def _missing(self, first: int) -> RunError:
        absent = [first]
        try:
            for index in range(self.rank.count):
                if self.store.check([f"hello/{index}"]):
                    one = json.loads(self.store.get(f"hello/{index}"))
                    self.hosts[index], self.nodes[index] = str(one["host"]), int(one["node"])
                elif index > first:
                    absent.append(index)
        except RuntimeError:
            pass  # the store is gone as well: what is known is said
        names = ", ".join(map(str, absent[:8]))
        found = RunError(
            "peer_missing",
            f"rank {names} of {self.rank.count} did not come within {self.timeout:g} s",
            where="training.distributed",
            fix="look at its log; training.distributed.timeout_seconds waits longer",
        )
        found.said = self._leader(absent) != self.rank.index
        return found

    def wait_for(self, key: str) -> None:
        """Waits for something another process does, however long that takes, while it lives.

        Raises:
            RunError: A process is gone or has failed.
        """
        while not self._is_there(key):
            time.sleep(0.1)
            if (error := self.trouble()) is not None:
                raise error

    def _is_there(self, key: str) -> bool:
        try:
            return bool(self.store.check([key]))
        except RuntimeError as error:
            raise self._without_store(error) from None

    def report(self, error: BaseException) -> None:
        """Tells the others why this process ends."""
        with contextlib.suppress(RuntimeError):  # the store may be gone too
            if isinstance(error, GlasstuneError) and error.code in _OF_OTHERS:
                self._own.set(f"ended/{self.rank.index}", "")  # each finds out by itself
                return
            number = self._own.add("failures", 1)
            record = {"rank": self.rank.index, "error": _content(error)}
            self._own.set(f"failure/{number}", json.dumps(record))

    def settle(self, error: BaseException) -> None:
        """Finds out whether another process of this machine says the same, and sets `said`."""
        if isinstance(error, GlasstuneError) and error.code not in _OF_OTHERS:
            with contextlib.suppress(RuntimeError):
                error.said |= self._says_the_same(_content(error))

    def _says_the_same(self, content: Mapping[str, Any]) -> bool:
        """Whether a lower rank of this machine ends with the same words."""
        lower = [r for r in self.nodes if r < self.rank.index and self._near(r)]
        until = time.monotonic() + 3.0
        while lower and time.monotonic() < until:
            said = [(r, e) for r, e in self._failures() if r in lower]
            if any(e == content for _, e in said):
                return True
            others = {r for r, _ in said}
            others |= {r for r in lower if self._own.check([f"ended/{r}"])}
            if len(others) == len(lower):
                break
            time.sleep(0.1)
        return False

    def _near(self, index: int) -> bool:
        mine = (self.nodes.get(self.rank.index), self.hosts.get(self.rank.index))
        return (self.nodes.get(index), self.hosts.get(index)) == mine

    def _failures(self) -> list[tuple[int, dict[str, str]]]:
        found = []
        for number in range(1, int(self._own.add("failures", 0)) + 1):
            key = f"failure/{number}"
            if self._own.check([key]):
                record = json.loads(self._own.get(key))
                found.append((int(record["rank"]), record["error"]))
        return found

    def trouble(self) -> RunError | None:
        """Returns what is known to be wrong with another process, or None."""
        try:
            others = [(r, e) for r, e in self._failures() if r != self.rank.index]
        except RuntimeError as error:
            return self._without_store(error)
        if others:
            return self._of_failure(*others[0])
        lost = self._silent(min(LOST_SECONDS, HURRY_SECONDS) if self._hurry else LOST_SECONDS)
        return self._of_silence(lost) if lost else None

    def explained(self, error: BaseException) -> RunError:
        """Returns the one clear error behind a collective that failed."""
        started: dict[int, str] = {}
        # A beat may have been written just before the end, and is seen one later.
        for seconds in (2 * BEAT_SECONDS, _LOOK_SECONDS):
            until = time.monotonic() + seconds
            started = {r: beat for r, (beat, _) in self._heard.items()}
            while time.monotonic() < until:
                if (found := self.trouble()) is not None:
                    return found
                time.sleep(0.1)
        still = [r for r, (beat, _) in self._heard.items() if started.get(r) == beat != _DONE]
        if still:
            return self._of_silence(still)
        gone = [r for r, (beat, _) in self._heard.items() if beat == _DONE]
        who = f"rank {', '.join(map(str, gone))} has ended already; " if gone else ""
        return RunError(
            "collective_failed",
            f"rank {self.rank.index} could not exchange with the others: {who}{_first_line(error)}",
            where="training.distributed",
            fix="training.distributed.timeout_seconds waits longer, where a rank is slow",
        )

    def _of_failure(self, index: int, error: Mapping[str, str]) -> RunError:
        place = f"{error['where']}: " if error["where"] else ""
        found = RunError(
            "peer_failed",
            f"rank {index} on {self.hosts.get(index, '?')} failed: {place}{error['message']}",
            where="training.distributed",
            fix=error["fix"] or "look at the log of that process",
        )
        # Where it is on this machine it has said so itself.
        found.said = self._near(index) or self._leader([index]) != self.rank.index
        return found

    def _of_silence(self, lost: list[int]) -> RunError:
        names = ", ".join(f"rank {r} on {self.hosts.get(r, '?')}" for r in lost[:8])
        found = RunError(
            "peer_lost",
            f"{names} is gone: it was killed, or its machine does not answer (the last good "
            "checkpoint is kept)",
            where="training.distributed",
            fix=_RESUME,
        )
        found.said = self._leader(lost) != self.rank.index
        return found

    def _without_store(self, error: BaseException) -> RunError:
        keeper = "torchrun of the first machine" if self.rank.agent else "rank 0"
        found = RunError(
            "peer_lost",
            f"{keeper} at {self.rank.address}:{self.rank.port} is gone ({_first_line(error)}; the "
            "last good checkpoint is kept)",
            where="training.distributed",
            fix=_RESUME,
        )
        found.said = self._leader([] if self.rank.agent else [0]) != self.rank.index
        return found

    def _leader(self, lost: list[int]) -> int:
        """The lowest rank on this machine that is still there."""
        return min(r for r in self.nodes if self._near(r) and r not in lost)

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [
            index
            for index, (beat, heard) in self._heard.items()
            if beat != _DONE and now - heard > seconds
        ]

    def _watch(self) -> None:
        others = [index for index in range(self.rank.count) if index != self.rank.index]
        keys = [f"beat/{index}" for index in others]
        count = 0
        while not self._ended.wait(BEAT_SECONDS):
            count += 1
            if self._signals is not None and not self._hurry:
                with contextlib.suppress(BlockingIOError):
                    self._hurry = bool(os.read(self._signals[0], 16))
            try:
                self._own.set(f"beat/{self.rank.index}", str(count))
                beats = [value.decode() for value in self._own.multi_get(keys)]
            except RuntimeError as error:
                self._end_with(self._without_store(error))
                return
            now = time.monotonic()
            for index, beat in zip(others, beats, strict=True):
                if index not in self._heard or self._heard[index][0] != beat:
                    self._heard[index] = (beat, now)
            if (found := self.trouble()) is not None:
                self._end_with(found)
                return

    def _end_with(self, error: RunError) -> None:
        """Gives the main thread a moment; one that hangs in a device's collective never ends."""
        if self._ended.wait(min(GRACE_SECONDS, HURRY_SECONDS) if self._hurry else GRACE_SECONDS):
            return
        _say(error)
        os._exit(error.exit_code)

    def stop(self) -> None:
        """Ends the heartbeat: this process has nothing more to do with the others."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_SECONDS)
        if self._signals is not None:
            signal.set_wakeup_fd(-1)
            if signal.getsignal(signal.SIGTERM) == self._terminated:
                signal.signal(signal.SIGTERM, self._before)
            for end in self._signals:
                os.close(end)
            self._signals = None
        try:
            self._own.set(f"beat/{self.rank.index}", _DONE)
            if self._hosts_it:
                self._outlive_others()
        except RuntimeError:
            return

    def _outlive_others(self) -> None:
        """Rank 0 keeps the store: it stays until the others are done with it, or are no more."""
        until = time.monotonic() + LOST_SECONDS
        every = [f"beat/{index}" for index in range(1, self.rank.count)]
        keys = [key for key in every if self._own.check([key])]
        seen: dict[str, tuple[bytes, float]] = {}
        while (now := time.monotonic()) < until:
            for key, beat in zip(keys, self._own.multi_get(keys), strict=True):
                if key not in seen or seen[key][0] != beat:
                    seen[key] = (beat, now)
            if all(b == _DONE.encode() or now - t > _LOOK_SECONDS for b, t in seen.values()):
                return
            time.sleep(0.05)


def _say(error: RunError) -> None:
    if not error.said:
        sys.stderr.write(f"error: {error.where}: {error.message}\nhint: {error.fix}\n")
        sys.stderr.flush()


def _content(error: BaseException) -> dict[str, str]:
    if isinstance(error, GlasstuneError):
        return error.to_dict()
    says = f"{type(error).__name__}: {error}"
    return {"code": "bug", "message": says, "where": "", "fix": ""}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
