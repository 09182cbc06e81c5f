"""Several GPUs of one host: the cost of shared rows, and what a sharded base leaves a rank.

    python bench/gpu_distributed.py                    # every GPU, the shape of Llama-3-8B, 4 bit
    python bench/gpu_distributed.py --ranks 2 --bits 16 --parts ddp
    python bench/gpu_distributed.py --device cpu --ranks 2 --model toy --seq 64 --no-compile

Random weights, made on the device; nothing is downloaded. torchrun's own launcher starts one
process a GPU. Each part prints `RESULT {json}` as soon as it is known:

- `alone`: rank 0 trains `batch` x `seq` tokens an update, the other GPUs wait;
- `ddp`: all ranks train as many tokens each and add their gradients up as the run's loop does;
  `efficiency` is the tokens a second of all against `ranks` times those of `alone`;
- `exchange`: that addition by itself, on the device and on the host;
- `fsdp2`: bytes of a rank before and after the frozen base is sharded, what a plan expects, a step
  of both, and whether the losses are the same bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import gpu_step

GIB = 2**30


class SharedStep(gpu_step.Step):
    """An update whose rows are divided over ranks: the exchanges of `training.loop`."""

    world: Any = None

    def __call__(self) -> Tensor:
        """Makes one update and returns its loss, still on the device."""
        world = self.world
        world.sum([0.0, 0.0])  # a signal, a save
        world.sum([float(self.targets.numel())])  # the update's counts
        loss = self.loss() / world.size
        loss.backward()
        total, _ = world.reduce_update(self.trained, loss.detach().reshape(1), [1.0, 1.0])
        grads = [value.grad for value in self.trained]
        torch.nn.utils.clip_grads_with_norm_(
            self.trained, 1.0, torch.nn.utils.get_total_norm(grads)
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def say(world: Any, part: str, args: argparse.Namespace, **content: Any) -> None:
    """Prints a result on rank 0."""
    if world.rank == 0:
        shared = {
            "part": part, "ranks": world.size, "model": args.model, "bits": args.bits,
            "tokens_a_rank": args.batch * args.seq, "seconds": round(time.monotonic() - START, 1),
        }  # fmt: skip
        line = {**shared, **content, **gpu_step.machine(args.device)}
        print("RESULT " + json.dumps(line), flush=True)


def memory(args: argparse.Namespace) -> int | None:
    """Bytes that are allocated."""
    return torch.cuda.memory_allocated() if args.device == "cuda" else None


def peak(args: argparse.Namespace) -> int | None:
    """The most since it was asked last."""
    if args.device != "cuda":
        return None
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def options(args: argparse.Namespace, *more: str) -> argparse.Namespace:
    """The arguments of `gpu_step` for a model like this one."""
    words = [
        "--model", args.model, "--bits", str(args.bits), "--batch", str(args.batch), "--seq",
        str(args.seq), "--layers", str(args.layers), "--device", args.device, *more,
    ]  # fmt: skip
    found = gpu_step.parse(words)
    found.compile = args.compile
    return found


def measure_ddp(world: Any, args: argparse.Namespace) -> None:
    """One GPU alone, then all of them."""
    from glasstune.training.distributed import ALONE

    asked = options(args)
    model = gpu_step.build(asked)
    step = SharedStep(model, asked)
    world.share_parameters(step.trained)
    report = gpu_step.put_way(model, asked, "fast")
    step.world = ALONE
    for _ in range(3):
        float(step())
    world.sum([0.0])
    alone = 0.0
    if world.rank == 0:
        alone = statistics.median(gpu_step.timed(step, args.steps, args.device))
    alone = world.broadcast(alone)
    tokens = args.batch * args.seq
    say(world, "alone", args, ms=round(alone, 1), tokens_per_second=round(tokens / alone * 1e3))
    step.world = world
    step.optimizer.state.clear()  # rank 0 has made steps of its own
    world.share_parameters(step.trained)
    for _ in range(2):
        float(step())
    world.sum([0.0])
    peak(args)
    times = gpu_step.timed(step, args.steps, args.device)
    each = world.gather(statistics.median(times))
    high = max(each)
    world.check_equal({str(n): value for n, value in enumerate(step.trained)}, args.steps)
    say(
        world, "ddp", args, ms=round(high, 1), ms_by_rank=[round(ms, 1) for ms in each],
        ms_alone=round(alone, 1), tokens_per_second=round(world.size * tokens / high * 1e3),
        efficiency=round(alone / high, 4), peak_bytes=peak(args), weights_equal=True,
    )  # fmt: skip
    exchange(world, args, step)
    if report is not None:
        report.undo()


def exchange(world: Any, args: argparse.Namespace, step: SharedStep) -> None:
    """The addition of gradients by itself."""
    for value in step.trained:
        value.grad = torch.ones_like(value)
    sums = torch.zeros(1, device=step.trained[0].device)
    device, host = [], []
    for _ in range(10):
        start = time.perf_counter()
        world.reduce_update(step.trained, sums, [1.0, 1.0])
        if args.device == "cuda":
            torch.cuda.synchronize()
        device.append((time.perf_counter() - start) * 1e3)
        start = time.perf_counter()
        world.sum([1.0, 1.0])
        host.append((time.perf_counter() - start) * 1e3)
    for value in step.trained:
        value.grad = None
    size = sum(value.numel() * value.element_size() for value in step.trained)
    say(
        world, "exchange", args, gradient_bytes=size, ms=round(statistics.median(device), 2),
        host_ms=round(statistics.median(host), 3),
    )  # fmt: skip


def measure_fsdp2(world: Any, args: argparse.Namespace) -> None:
    """The same model whole and sharded, every layer computed again, nothing compiled."""
    from glasstune.training.sharding import shard_base

    args.compile = False
    asked = options(args, "--recompute", "-1")
    model = gpu_step.build(asked)
    step = SharedStep(model, asked)
    step.world = world
    world.share_parameters(step.trained)
    held = weights_of(step)
    frozen = sum(
        value.numel() * value.element_size()
        for name, value in model.named_parameters()
        if value.dtype != torch.float32 and not value.requires_grad and is_layer(name)
    )
    found: dict[str, Any] = {"whole_bytes": memory(args)}
    found["whole_ms"], found["whole_peak_bytes"], losses = some_steps(step, args)
    step.optimizer.state.clear()
    restore(step, held)
    before = memory(args)
    found["sharded_bytes"] = shard_base(model, step.trained[0].device, world.size)
    after = memory(args)
    if before is not None and after is not None:
        found["rank_bytes"], found["freed_bytes"] = after, before - after
        found["expected_freed_bytes"] = frozen - -(-frozen // world.size)
    found["ms"], found["peak_bytes"], again = some_steps(step, args)
    found["same_losses"] = losses == again
    say(world, "fsdp2", args, frozen_layer_bytes=frozen, **found)


def is_layer(name: str) -> bool:
    """Whether a parameter lies in a decoder layer."""
    return ".layers." in name or ".h." in name


def some_steps(step: SharedStep, args: argparse.Namespace) -> tuple[float, int | None, list[float]]:
    """Returns the milliseconds of an update, the peak, and the losses of three updates."""
    peak(args)
    losses = [float(step()) for _ in range(3)]
    times = gpu_step.timed(step, 2, args.device)
    return round(min(times), 1), peak(args), losses


def weights_of(step: SharedStep) -> list[Tensor]:
    """Copies of the trained tensors."""
    return [value.detach().clone() for value in step.trained]


@torch.no_grad()
def restore(step: SharedStep, values: list[Tensor]) -> None:
    """Puts copies back."""
    for value, held in zip(step.trained, values, strict=True):
        value.copy_(held)


def worker(args: argparse.Namespace) -> int:
    """One rank."""
    from glasstune.core.ranks import this_rank
    from glasstune.training.distributed import join

    world = join(this_rank(), {}, device=args.device, timeout=240)
    try:
        for part in args.parts.split(","):
            {"ddp": measure_ddp, "fsdp2": measure_fsdp2}[part](world, args)
            if args.device == "cuda":
                import gc

                gc.collect()
                torch.cuda.empty_cache()
    except BaseException as error:
        world.leave(error)
        raise
    world.leave()
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--parts", default="ddp,fsdp2")
    parser.add_argument("--model", choices=gpu_step.SHAPES, default="llama8b")
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=0, help="0 = all")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Starts one process a GPU, or is one."""
    args = parse(argv)
    if args.worker:
        return worker(args)
    if args.ranks < 2:
        print("this bench needs at least two GPUs (or --device cpu --ranks 2)", file=sys.stderr)
        return 2
    from torch.distributed import run

    words = sys.argv[1:] if argv is None else argv
    start = ["--standalone", f"--nproc-per-node={args.ranks}", __file__, "--worker", *words]
    run.run(run.parse_args(start))
    return 0


START = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
