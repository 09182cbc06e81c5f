"""The processes of one run and what they exchange: torch.distributed, and nothing else of ours.

Every rank holds the whole adapter and computes its own rows. Gradients of the adapters are summed
once an update, in one flat float32 buffer: they are small (168 MB for rank 16 on the shape of
Llama-3-8B), so hiding that behind the backward would save little, and a rank without rows, a tensor
that only some ranks reached, and an audit's own backwards need no special road.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from glasstune.core.errors import InputError, RunError
from glasstune.core.ranks import Rank
from glasstune.training.peers import Peers

_SESSIONS = itertools.count()


class World:
    """The ranks of a run; alone, everything is what it was given.

    Args:
        rank: This process.
        peers: The others, or None.
        group: Of exchanges on the host.
        owns_group: Whether it was made here.
    """

    def __init__(
        self,
        rank: Rank | None = None,
        peers: Peers | None = None,
        group: Any = None,
        owns_group: bool = False,
    ) -> None:
        self.place = rank or Rank()
        self.peers = peers
        self._group = group
        self._owns_group = owns_group

    @property
    def rank(self) -> int:
        """Number of this process; 0 writes."""
        return self.place.index

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.place.count

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.place.index == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Adds numbers over all ranks, in float64 on the host."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with self._guarded():
            dist.all_reduce(total, group=self._group)
        return [float(value) for value in total.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._guarded():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value."""
        if self.size == 1:
            return value
        box = [value if self.writes else None]
        with self._guarded():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def sum_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Adds tensors over all ranks, at one exchange.

        Args:
            tensors: Of one device and dtype; the same shapes on every rank.

        Returns:
            The sums, views of one flat tensor.
        """
        if self.size == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._guarded():
            dist.all_reduce(flat)
        return _split(flat, tensors)

    def reduce_update(
        self, parameters: Sequence[Parameter], sums: Tensor, numbers: Sequence[float]
    ) -> tuple[Tensor, list[float]]:
        """Adds gradients, loss sums and counts of an update over all ranks.

        A tensor that no rank reached keeps no gradient.

        Args:
            parameters: In the same order on every rank.
            sums: fp32 [K] on the parameters' device.
            numbers: More of the update, on the host.

        Returns:
            The sums and numbers over all ranks; gradients are replaced in place.
        """
        if self.size == 1:
            return sums, list(numbers)
        reached = [float(value.grad is not None) for value in parameters]
        everything = self.sum([*reached, *numbers])
        held = [p for p, count in zip(parameters, everything, strict=False) if count > 0]
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in held]
        *grads, total = self.sum_tensors([*given, sums])
        for parameter, grad in zip(held, grads, strict=True):
            parameter.grad = grad
        return total, everything[len(reached) :]

    @torch.no_grad()
    def share_parameters(self, parameters: Sequence[Parameter]) -> None:
        """Gives every rank the values of rank 0."""
        if self.size == 1 or not parameters:
            return
        flat = torch.cat([value.detach().reshape(-1) for value in parameters])
        with self._guarded():
            dist.broadcast(flat, src=0)
        for value, part in zip(parameters, _split(flat, parameters), strict=True):
            value.copy_(part)

    def check_equal(self, parameters: Mapping[str, Parameter], step: int) -> None:
        """Compares the ranks' weights bit for bit.

        Raises:
            RunError: `ranks_differ`: names rank and tensor.
        """
        if self.size == 1:
            return
        mine = digests(parameters)
        everybody = self.gather(mine)
        for rank, theirs in enumerate(everybody):
            bad = [n for n, a, b in zip(parameters, everybody[0], theirs, strict=True) if a != b]
            if bad:
                raise RunError(
                    "ranks_differ",
                    f"after update {step} rank {rank} holds other weights than rank 0 in "
                    f"{len(bad)} of {len(parameters)} tensors, first {bad[0]}",
                    where=f"step {step}",
                    fix="train on devices of one kind, with the same versions; the last good "
                    "checkpoint is kept",
                )

    def agree(self, what: str, value: Any, *, fix: str) -> None:
        """Refuses to go on where a rank has another value than rank 0.

        Args:
            what: What it is, for the message.
            value: Plain, comparable values by name.
            fix: What to do.

        Raises:
            InputError: `ranks_differ`: names the rank and what differs.
        """
        first, *others = self.gather(value)
        for rank, theirs in enumerate(others, 1):
            if theirs == first:
                continue
            names = sorted({*first, *theirs})
            says = [
                f"{name}: {first.get(name)!r} on rank 0, {theirs.get(name)!r} on rank {rank}"
                for name in names
                if first.get(name) != theirs.get(name)
            ]
            raise InputError(
                "ranks_differ",
                f"rank {rank} on {self.host(rank)} has {what} of its own: {'; '.join(says[:6])}"
                + (f" and {len(says) - 6} more" if len(says) > 6 else ""),
                where="training.distributed",
                fix=fix,
            )

    def host(self, rank: int) -> str:
        """Name of a rank's machine."""
        return "this machine" if self.peers is None else self.peers.hosts.get(rank, "?")

    @contextmanager
    def leader_first(self, name: str) -> Iterator[None]:
        """Lets one process of each machine go ahead, so that caches are filled once."""
        if self.peers is None:
            yield
            return
        key = f"{name}/{self.place.node}/{self.host(self.rank)}"
        if self.place.local:
            self.peers.wait_for(key)
        yield
        if not self.place.local:
            self.peers.store.set(key, "1")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns torch's error of an exchange into one that names the rank at fault."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.peers is None:
                raise
            raise self.peers.explained(error) from error

    def leave(self, error: BaseException | None = None) -> None:
        """Ends the exchange; says why where it ends by an error."""
        if self.peers is None:
            return
        if error is None:
            self.peers.stop()
            if self._owns_group:
                dist.destroy_process_group()
            return
        self.peers.report(error)
        # NCCL would wait for a collective that a lost rank never joins; gloo tells the others.
        if self._owns_group and dist.get_backend() == "gloo":
            self._group = None  # its connections end with the last reference
            dist.destroy_process_group()
        self.peers.settle(error)
        self.peers.stop()


ALONE = World()
"""One process."""


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Returns views of a flat tensor in the shapes of others."""
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def digests(parameters: Mapping[str, Parameter]) -> list[str]:
    """Returns a hash of the bits of each tensor."""
    found = []
    for value in parameters.values():
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found.append(hashlib.blake2b(bits.tobytes(), digest_size=8).hexdigest())
    return found


def join(rank: Rank, hello: Mapping[str, Any], *, device: str, timeout: float) -> World:
    """Meets the other processes of the run.

    Args:
        rank: This process.
        hello: Versions and the like; every rank must say the same.
        device: `cuda` takes the GPU of the rank's number and NCCL; `cpu` gloo.
        timeout: Seconds that an exchange may wait.

    Raises:
        InputError: `ranks_differ`, `no_gpu_for_rank`.
        RunError: `master_unreachable`, `peer_missing`.
    """
    if rank.count == 1:
        return ALONE
    if device == "cuda":
        _take_gpu(rank)
    peers = Peers(rank, timeout, next(_SESSIONS))
    world = World(rank, peers)
    try:
        everybody = peers.meet(hello)
        _compare(everybody)
        _make_group(world, device, timeout)
    except BaseException as error:
        world.leave(error)
        raise
    return world


def _take_gpu(rank: Rank) -> None:
    count = torch.cuda.device_count()
    if count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        torch.cuda.set_device(0)  # the launcher has given each process its own
        return
    if rank.local >= count:
        raise InputError(
            "no_gpu_for_rank",
            f"rank {rank.index} is process {rank.local} of its machine, which has {count} GPUs",
            where="--nproc-per-node",
            fix=f"start at most {count} processes a machine, or set model.device=cpu",
        )
    torch.cuda.set_device(rank.local)


def _compare(everybody: Sequence[Mapping[str, Any]]) -> None:
    first = everybody[0]
    for rank, other in enumerate(everybody):
        says = [
            f"{name} {other.get(name)} (rank 0: {first.get(name)})"
            for name in sorted({*first, *other} - {"host", "node"})
            if first.get(name) != other.get(name)
        ]
        if says:
            raise InputError(
                "ranks_differ",
                f"rank {rank} on {other['host']} runs with {', '.join(says)}",
                where="training.distributed",
                fix="install the same versions and start the same command on every machine",
            )


def _make_group(world: World, device: str, timeout: float) -> None:
    limit = timedelta(seconds=timeout)
    assert world.peers is not None
    with world._guarded():
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                store=world.peers.within("group"),
                rank=world.rank, world_size=world.size, timeout=limit,
            )  # fmt: skip
            world._owns_group = True
            world._group = dist.group.WORLD
        else:  # another engine has made one, perhaps for GPUs alone
            world._group = dist.new_group(backend="gloo", timeout=limit)
