"""The plan against measured memory: GPU peaks of real shapes, and resident memory on a CPU.

    python bench/plan.py gpu                      # twelve cases and more, about 4 minutes on an H100
    python bench/plan.py gpu --only llama8b-4     # cases whose name holds this
    python bench/plan.py gpu --device cpu --tiny  # the same road on a CPU: predictions alone
    python bench/plan.py cpu                      # four cases with SmolLM2-135M

Every case prints one line `RESULT {json}`: what was predicted before anything was allocated, what
was measured, and the relative error. Each case runs in a process of its own, so that no peak and no
library's workspace of another is in it. GPU weights are random and made on the device, as in
`bench/gpu_step.py`; the measured peak is `torch.cuda.max_memory_allocated` over four updates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_STEPS = 4


@dataclass(frozen=True)
class Case:
    """One GPU case."""

    model: str
    bits: int
    policy: str
    layers: int
    rows: int
    length: int
    way: str = "fast"

    @property
    def name(self) -> str:
        """Words for `--only`."""
        return f"{self.model}-{self.bits}-{self.policy}-{self.way}"


def gpu_cases(tiny: bool) -> list[Case]:
    """Returns the cases; the tiny ones run anywhere."""
    if tiny:
        return [Case("toy", bits, policy, 0, 2, 64) for bits in (16, 8, 4) for policy in POLICIES]
    cases = [
        Case(model, bits, policy, layers, rows, length)
        for model, layers, rows, length in (("llama8b", 8, 4, 2048), ("qwen3b", 12, 4, 1024))
        for bits in (16, 8, 4)
        for policy in POLICIES
    ]
    cases += [Case("llama8b", bits, "half", 8, 2, 2048) for bits in (16, 4)]
    cases += [Case("llama8b", 4, policy, 8, 4, 2048, "eager") for policy in POLICIES]
    return cases


POLICIES = ("none", "full")

QWEN3B: tuple[str, dict[str, Any]] = (
    "qwen2",
    {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
     "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
     "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
)  # fmt: skip


def shapes() -> dict[str, tuple[str, dict[str, Any]]]:
    import gpu_step

    gpu_step.SHAPES.setdefault("qwen3b", QWEN3B)
    return gpu_step.SHAPES


def planned(case: Case, target: str) -> Any:
    """Returns (memory model, activations, recomputation): the prediction, before any weight."""
    import gpu_step
    from transformers import AutoConfig

    from glasstune.core.recompute import Recompute
    from glasstune.models.inspect.source import open_source
    from glasstune.planner.live import Batch
    from glasstune.planner.model import MemoryModel, Setup

    kind, options = shapes()[case.model]
    options = dict(options)
    if case.layers:
        options["n_layer" if "n_layer" in options else "num_hidden_layers"] = case.layers
    config = AutoConfig.for_model(kind, **options)
    adapter = {"r": gpu_step.RANK, "lora_alpha": gpu_step.ALPHA, "target_modules": "all-linear"}
    quantization = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = MemoryModel(
        Setup(
            open_source(config), case.bits, adapter, quantization if case.bits == 4 else {},
            target=target, fast=case.way == "fast", compiled=case.way == "fast",
        )
    )  # fmt: skip
    batch = model.activations(Batch(case.rows, case.length))
    layers = {"none": 0, "full": model.layers, "half": model.layers // 2}[case.policy]
    return model, batch, Recompute(layers)


def gpu_case(case: Case, device: str) -> dict[str, Any]:
    """Predicts, builds, runs, compares."""
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    from glasstune.planner.peak import moments, owner, peak

    started = time.perf_counter()
    model, batch, recompute = planned(case, "cuda")
    planning = time.perf_counter() - started
    workspace = library_bytes(device)
    found = moments(model.static, batch, recompute, context=0, workspace=workspace)
    high = peak(found)
    result: dict[str, Any] = {
        "case": case.name, "layers": case.layers, "rows": case.rows, "length": case.length,
        "predicted": high.bytes, "phase": high.phase, "owner": owner(high), "parts": high.parts,
        "static": vars_of(model.static), "library_bytes": workspace,
        "before": batch.before, "head": batch.head, "head_kept": batch.head_kept,
        "plain": vars_of(batch.plain[-1]), "again": vars_of(batch.again[-1]),
        "moments": {m.phase: m.bytes for m in found}, "plan_seconds": round(planning, 1),
    }  # fmt: skip
    if device == "cuda":
        result |= measured(case, recompute)
        result["error"] = round(result["predicted"] / result["measured"] - 1, 4)
        result |= machine()
    torch.manual_seed(0)
    return result


def vars_of(value: Any) -> dict[str, int]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def library_bytes(device: str) -> int:
    """Returns what products keep allocated: one workspace for each of two threads."""
    if device != "cuda":
        return 0
    from glasstune.planner.device import library_bytes as found

    return found()


def measured(case: Case, recompute: Any) -> dict[str, Any]:
    """Makes the model on the card and runs updates."""
    import gpu_step
    import torch

    shapes()
    args = gpu_step.parse(
        ["--bits", str(case.bits), "--seq", str(case.length), "--batch", str(case.rows),
         "--layers", str(case.layers), "--way", case.way, "--device", "cuda"]
    )  # fmt: skip
    args.model = case.model
    model = gpu_step.build(args)
    step = gpu_step.Step(model, args)
    base = torch.cuda.memory_allocated()
    gpu_step.put_way(model, args, args.way)
    recompute_blocks(model, recompute.layers)
    torch.cuda.empty_cache()
    after = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step()  # compiles, and makes the optimiser's state
    step.optimizer.zero_grad(set_to_none=True)
    first = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    loss = step.loss()
    kept = torch.cuda.memory_allocated() - resting
    forward = torch.cuda.max_memory_allocated() - resting
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    backward = torch.cuda.max_memory_allocated() - resting
    step.optimizer.zero_grad(set_to_none=True)
    del loss
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(GPU_STEPS - 2):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / (GPU_STEPS - 2)
    peak = max(first, torch.cuda.max_memory_allocated())
    free, total = torch.cuda.mem_get_info()
    return {
        "measured": peak, "measured_first": first, "measured_base": base, "measured_wide": after,
        "measured_resting": resting, "measured_kept": kept, "measured_forward": forward,
        "measured_backward": backward, "reserved": torch.cuda.max_memory_reserved(),
        "context": total - free - torch.cuda.memory_reserved(), "seconds_a_step": round(seconds, 4),
        "build_seconds": round(begin - started, 1),
    }  # fmt: skip


def recompute_blocks(model: Any, layers: int) -> None:
    """Has the first blocks computed again in the backward."""
    if not layers:
        return
    from glasstune.core.recompute import Recompute
    from glasstune.training.recompute import apply_recompute

    apply_recompute(model, Recompute(layers))


def machine() -> dict[str, Any]:
    import gpu_step

    return gpu_step.machine("cuda")


def run_gpu(args: argparse.Namespace) -> int:
    worst = 0.0
    for case in gpu_cases(args.tiny):
        if args.only and args.only not in case.name:
            continue
        command = [sys.executable, __file__, "gpu", "--device", args.device, "--case", case.name]
        done = subprocess.run(
            command + (["--tiny"] if args.tiny else []), stdout=subprocess.PIPE, text=True
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if done.returncode or not lines:
            print(
                "RESULT " + json.dumps({"case": case.name, "failed": done.returncode}), flush=True
            )
            worst = 1.0
            continue
        print(lines[-1], flush=True)
        worst = max(worst, abs(json.loads(lines[-1].removeprefix("RESULT ")).get("error") or 0.0))
    print(f"worst error {worst:.2%}", flush=True)
    return 0 if worst <= 0.05 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("what", choices=("gpu", "cpu"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.what == "cpu":
        raise SystemExit("see below")
    if args.case is None:
        return run_gpu(args)
    case = next(case for case in gpu_cases(args.tiny) if case.name == args.case)
    print("RESULT " + json.dumps(gpu_case(case, args.device)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
