"""Several GPUs of one host: the cost of shared rows, and what a sharded base leaves a rank.

    python bench/gpu_distributed.py                    # every GPU, the shape of Llama-3-8B, 4 bit
    python bench/gpu_distributed.py --ranks 2 --bits 16 --parts ddp
    python bench/gpu_distributed.py --parts fsdp2      # 4, 8 and 16 bit, compiled and not
    python bench/gpu_distributed.py --device cpu --ranks 2 --model toy --seq 64 --no-compile

Random weights, made on the device; nothing is downloaded. torchrun's own launcher starts one
process a GPU. Each part prints `RESULT {json}` as soon as it is known:

- `alone`: rank 0 trains `batch` x `seq` tokens an update, the other GPUs wait;
- `ddp`: all ranks train as many tokens each and add their gradients up as the run's loop does;
  `efficiency` is the tokens a second of all against `ranks` times those of `alone`;
- `exchange`: that addition by itself, on the device and on the host;
- `fsdp2`: bytes of a rank before and after the frozen base is sharded, what a plan expects, an
  update of both, whether the losses are the same bits, and, compiled, whether graphs were made
  after the second update. One line as PEFT computes it and one compiled, for 4, 8 and 16 bit; a
  line `whole` before each, of the model that is not sharded yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import Counter
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
    if args.backend:
        words += ["--backend", args.backend]
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
    """The same model whole and sharded, every layer computed again, each way as it is and compiled.

    Each of the two kinds of update has a line of its own.
    """
    from glasstune.training.sharding import shard_base

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
    ways = (False, True) if args.compile else (False,)
    bytes_whole = memory(args)
    whole = {}
    for way in ways:
        whole[way] = measured(step, asked, args, held, way)
        say(world, "whole", args, compiled=way, **whole[way])
    before = memory(args)
    shared: dict[str, Any] = {"frozen_layer_bytes": frozen, "whole_bytes": bytes_whole}
    shared["sharded_bytes"] = shard_base(model, step.trained[0].device, world.size)
    after = memory(args)
    if before is not None and after is not None:
        shared["rank_bytes"], shared["freed_bytes"] = after, before - after
        shared["expected_freed_bytes"] = frozen - -(-frozen // world.size)
    for way in ways:
        found, base = measured(step, asked, args, held, way), whole[way]
        far = [abs(a - b) for a, b in zip(found.pop("losses"), base.pop("losses"), strict=True)]
        base_ms = {f"whole_{name}": value for name, value in base.items()}
        say(
            world, "fsdp2", args, compiled=way, **found, same_losses=max(far) == 0.0,
            furthest_loss=max(far), **base_ms, **shared,
        )  # fmt: skip


def measured(
    step: SharedStep,
    asked: argparse.Namespace,
    args: argparse.Namespace,
    held: list[Tensor],
    compiled: bool,
) -> dict[str, Any]:
    """Some updates from the same weights, as PEFT computes them or sped up.

    Returns:
        Milliseconds, peak, losses; how adapted modules were computed, seconds until the third
        update, and graphs made after the second.
    """
    from torch._dynamo.utils import counters

    step.optimizer.state.clear()
    restore(step, held)
    torch._dynamo.reset()
    start = time.perf_counter()
    report = gpu_step.put_way(step.model, asked, "fast" if compiled else "eager")
    peak(args)
    losses = [float(step()) for _ in range(2)]
    graphs = counters["stats"]["unique_graphs"]
    losses.append(float(step()))
    cold = time.perf_counter() - start
    times = gpu_step.timed(step, args.few, args.device)
    found: dict[str, Any] = {
        "ms": round(statistics.median(times), 1), "ms_min": round(min(times), 1),
        "peak_bytes": peak(args), "losses": losses,
    }  # fmt: skip
    if report is not None:
        ways = Counter(module.way for module in report.record.modules)
        found |= {
            "modules": dict(ways), "regions": len(report.record.compiled),
            "cold_seconds": round(cold, 1),
            "late_graphs": counters["stats"]["unique_graphs"] - graphs,
        }  # fmt: skip
        report.undo()
    return found


def is_layer(name: str) -> bool:
    """Whether a parameter lies in a decoder layer."""
    return ".layers." in name or ".h." in name


def weights_of(step: SharedStep) -> list[Tensor]:
    """Copies of the trained tensors."""
    return [value.detach().clone() for value in step.trained]


@torch.no_grad()
def restore(step: SharedStep, values: list[Tensor]) -> None:
    """Puts copies back."""
    for value, held in zip(step.trained, values, strict=True):
        value.copy_(held)


def cases(args: argparse.Namespace) -> list[tuple[str, int]]:
    """What is measured, one after the other: (part, bits)."""
    every = {"ddp": (4,), "fsdp2": (4, 8, 16)}
    return [
        (part, bits)
        for part in args.parts.split(",")
        for bits in ([args.bits] if args.bits else every[part])
    ]


def worker(args: argparse.Namespace) -> int:
    """One rank."""
    from glasstune.core.ranks import this_rank
    from glasstune.training.distributed import join

    world = join(this_rank(), {}, device=args.device, timeout=240)
    try:
        for part, bits in cases(args):
            args.bits = bits
            {"ddp": measure_ddp, "fsdp2": measure_fsdp2}[part](world, args)
            gc.collect()
            if args.device == "cuda":
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
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), help="alone; see the parts")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=0, help="0 = all")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--few", type=int, default=5, help="timed updates of a case of fsdp2")
    parser.add_argument("--backend", help="another compiler backend, for a test of this file")
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
