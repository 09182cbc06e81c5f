"""Several processes of one run: how they meet, what they must have in common, who starts them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.config import Config, TrainingConfig
from glasstune.core.errors import GlasstuneError, InputError
from glasstune.core.findings import Finding
from glasstune.core.plan import PlanRecord
from glasstune.core.ranks import EXIT_FILE, Rank, this_rank
from glasstune.core.recompute import Recompute
from glasstune.workflows.run_folder import flat, versions

if TYPE_CHECKING:
    from glasstune.training.distributed import World
    from glasstune.training.step import AdaptedModel
    from glasstune.workflows.plan import Planned
    from glasstune.workflows.prepare_run import Prepared

_TIMEOUT = 600.0
FREE_BETWEEN_RANKS = re.compile(
    r"data\.num_workers$|data\.(sources|validation)\.\d+\.path$|(model|adapter)\.path$"
    r"|training\.(output_dir|max_memory|report_to|run_name)|losses\.\d+\.function$"
)
"""Keys that may differ: where files lie on a machine, and what concerns rank 0 alone."""


def meet(config: Config, **options: Any) -> World:
    """Joins the other processes of a run; alone where torchrun has started only this one.

    Args:
        config: Of this process; it must be the same on all.
        **options: Of the command, the same on all.

    Raises:
        InputError: `ranks_differ`, `rank_environment`, `no_gpu_for_rank`.
        RunError: `master_unreachable`, `peer_missing`, `peer_failed`.
    """
    rank = this_rank()
    if rank.count == 1:
        return alone()
    import torch

    from glasstune.training.distributed import join

    cuda = config.model.device != "cpu" and torch.cuda.is_available()
    timeout = config.training.distributed.timeout_seconds
    world = join(rank, hello(), device="cuda" if cuda else "cpu", timeout=timeout)
    every = flat(config.model_dump(mode="json", by_alias=True))
    mine = {key: value for key, value in every.items() if not FREE_BETWEEN_RANKS.match(key)}
    try:
        world.agree(
            "a configuration", {**mine, **options}, fix="start the same command on every machine"
        )
    except BaseException as error:
        world.leave(error)
        raise
    return world


def alone() -> World:
    """One process."""
    from glasstune.training.distributed import ALONE

    return ALONE


def hello() -> dict[str, str]:
    """Versions that must be the same on all ranks; Python's own may differ."""
    return {name: number for name, number in versions().items() if name != "python"}


def fail_together(error: GlasstuneError) -> None:
    """Tells the other ranks that this one has no configuration to begin with.

    Args:
        error: Why; `said` is set where another rank says the same.
    """
    rank = this_rank()
    if rank.count == 1:
        return
    from glasstune.training.peers import Peers

    try:
        peers = Peers(rank, _TIMEOUT)
        peers.give_up({**hello(), "error": error.to_dict()}, error)
    except GlasstuneError:
        return  # nobody is there to be told


def same_rows(world: World, prepared: Prepared) -> None:
    """Compares what was read on each rank.

    Raises:
        InputError: `ranks_differ`: other data, another base model or loss code.
    """
    world.agree(
        "data or a model",
        {
            "fingerprint of the data": prepared.data.fingerprint[:16],
            "fingerprint of the base model": prepared.resolved.fingerprint[:16],
            **{f"code of loss {term.name}": term.fingerprint[:16] for term in prepared.terms},
        },
        fix="give every machine the same files",
    )


@dataclass(frozen=True)
class Decided:
    """What rank 0 has planned, for the others to follow.

    Args:
        micro: Rows of a forward.
        strategy: How ranks share the model.
        recompute: Layers computed again.
        training: `training` of the configuration, as resolved so far.
        record: The plan, or None.
        updates: How many this start will make.
    """

    micro: int
    strategy: str
    recompute: Recompute | None
    training: TrainingConfig
    record: PlanRecord | None
    updates: int

    @classmethod
    def of(cls, prepared: Prepared, planned: Planned | None, updates: int) -> Decided:
        """Reads it from rank 0's."""
        return cls(
            prepared.schedule.micro,
            prepared.strategy,
            prepared.recompute,
            prepared.config.training,
            None if planned is None else planned.record,
            updates,
        )

    def follow(self, prepared: Prepared) -> tuple[Prepared, Planned | None]:
        """Returns another rank's run and plan, as rank 0 has them."""
        from glasstune.workflows.plan import Planned

        mine = prepared.config.training
        mine.per_device_train_batch_size = self.training.per_device_train_batch_size
        mine.recompute = self.training.recompute
        schedule = replace(prepared.schedule, micro=self.micro)
        ready = replace(
            prepared, schedule=schedule, recompute=self.recompute, strategy=self.strategy
        )
        if self.record is None:
            return ready, None
        return ready, Planned(self.record, ready, self.recompute or Recompute(0))


def least_free(world: World, config: Config) -> int | None:
    """Returns the free bytes of the rank that has least; None for one process."""
    if world.size == 1:
        return None
    import torch

    if config.model.device != "cpu" and torch.cuda.is_available():
        mine = torch.cuda.mem_get_info()[0]
    else:
        from glasstune.planner.host import available_bytes

        mine = available_bytes() // world.place.local_count
    return int(min(world.gather(mine)))


def joined(world: World, adapted: AdaptedModel, note: Callable[[Finding], None]) -> dict[str, Any]:
    """Says how ranks share a run, and what of the machine they leave idle.

    Args:
        world: The ranks.
        adapted: This rank's model.
        note: Takes what should be said.

    Returns:
        What `run.json` holds of it.
    """
    import torch

    cuda = adapted.device.type == "cuda"
    idle = torch.cuda.device_count() - world.place.local_count if cuda else 0
    if idle > 0:
        text = f"{idle} of {torch.cuda.device_count()} GPUs are idle"
        fix = "glasstune train --nproc all uses them"
        note(Finding("idle_gpus", "info", "training.distributed", f"{text}: {fix}", fix))
    if world.size == 1:
        return {"count": 1}
    kind = torch.cuda.get_device_name(adapted.device) if cuda else "cpu"
    kinds = world.gather(kind)
    if len(set(kinds)) > 1:
        text = (
            f"ranks run on unlike devices ({', '.join(sorted(set(kinds)))}): they may round "
            "differently, and a checkpoint stops the run where their weights are no longer equal"
        )
        note(Finding("unlike_devices", "warning", "training.distributed", text))
    strategy = "fsdp2" if adapted.sharded else "ddp"
    hosts = [world.host(rank) for rank in range(world.size)]
    return {"count": world.size, "strategy": strategy, "hosts": hosts, "devices": kinds}


def launch(count: int, words: Sequence[str]) -> int:
    """Starts `glasstune train` once for each device, by torchrun's own launcher.

    Args:
        count: Processes.
        words: After `glasstune train`.

    Returns:
        The exit code of rank 0, or 1 where it left none.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launcher: Any = torchrun
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    with tempfile.TemporaryDirectory(prefix="glasstune-") as folder:
        left = Path(folder) / "exit"
        os.environ[EXIT_FILE] = str(left)
        options = ["--standalone", f"--nproc-per-node={count}", "-m", "glasstune", "train", *words]
        try:
            launcher.run(launcher.parse_args(options))
        except (ChildFailedError, SignalException):
            return int(left.read_text()) or 1 if left.exists() else 1
        finally:
            del os.environ[EXIT_FILE]
    return 0


def device_count(asked: str, given: Mapping[str, str] | None = None) -> int:
    """Reads `--nproc`.

    Args:
        asked: A number, or `all` for every GPU.
        given: The environment; None for the process's own.

    Raises:
        InputError: `bad_nproc`, `nproc_inside_torchrun`.
    """
    rank: Rank = this_rank(given)
    if rank.count > 1:
        raise InputError(
            "nproc_inside_torchrun",
            f"torchrun has started this as one of {rank.count} processes already",
            where="--nproc",
            fix="leave --nproc out, or run glasstune without torchrun",
        )
    if asked == "all":
        import torch

        return max(1, torch.cuda.device_count())
    if not asked.isdigit() or int(asked) < 1:
        raise InputError(
            "bad_nproc",
            f"{asked!r} is no number of processes",
            where="--nproc",
            fix="write a number of at least 1, or all for every GPU",
        )
    return int(asked)
