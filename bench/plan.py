"""The plan against measured memory: GPU peaks of real shapes, and resident memory on a CPU.

    python bench/plan.py gpu                      # 29 cases, about 5 minutes on an H100
    python bench/plan.py gpu --only llama8b-4 # cases whose name holds this
    python bench/plan.py gpu --device cpu --tiny  # the same road on a CPU: predictions alone
    python bench/plan.py cpu                      # eight cases with SmolLM2-135M

Every case prints one line `RESULT {json}`: what was predicted before anything was allocated, what
was measured, and the relative error. Each model runs in a process of its own, three at a time: the
peak is that of the process's own allocator. GPU weights are random and made on the device, as in
`bench/gpu_step.py`; the measured peak is `torch.cuda.max_memory_allocated` over four updates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_STEPS = 4
WORKERS = 3


@dataclass(frozen=True)
class Case:
    """A model on the card; each of its policies is a case of the table."""

    model: str
    bits: int
    layers: int
    rows: int
    length: int
    policies: tuple[str, ...] = ("none", "full")
    way: str = "fast"
    compute: str = "bf16"

    @property
    def name(self) -> str:
        """Words for `--only`."""
        fp8 = "-fp8" if self.compute == "fp8" else ""
        return f"{self.model}-{self.bits}{fp8}-{self.rows}x{self.length}-{self.way}"


def gpu_cases(tiny: bool) -> list[Case]:
    """Returns the cases; the tiny ones run anywhere."""
    if tiny:
        fp8 = [Case("toy", bits, 0, 2, 64, compute="fp8") for bits in (16, 8, 4)]
        return [*(Case("toy", bits, 0, 2, 64) for bits in (16, 8, 4)), *fp8]
    some = ("none", "full", "half")
    cases = [Case("llama8b", bits, 8, 4, 2048, some) for bits in (16, 8, 4)]
    cases += [Case("qwen3b", bits, 12, 4, 1024, some) for bits in (16, 8, 4)]
    cases += [Case("llama8b", bits, 8, 4, 2048, some, compute="fp8") for bits in (16, 8, 4)]
    return [*cases, Case("llama8b", 4, 8, 2, 2048, way="eager")]


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
    """Returns (memory model, activations): the prediction, before any weight."""
    from transformers import AutoConfig

    import gpu_step
    from glasstune.models.inspect.source import open_source
    from glasstune.planner.model import MemoryModel, Setup
    from glasstune.planner.trace import Batch

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
            fp8=case.compute == "fp8",
        )
    )  # fmt: skip
    return model, model.activations(Batch(case.rows, case.length))


def gpu_case(case: Case, device: str) -> None:
    """Predicts every policy, then builds the model once and runs them; prints the lines."""
    sys.path.insert(0, str(Path(__file__).parent))
    from glasstune.core.recompute import Recompute
    from glasstune.planner.peak import moments, owner, peak

    started = time.perf_counter()
    model, batch = planned(case, "cuda")
    planning = time.perf_counter() - started
    workspace = library_bytes(device)
    card = Card(case) if device == "cuda" else None
    for policy in case.policies:
        count = {"none": 0, "full": model.layers, "half": model.layers // 2}[policy]
        found = moments(model.static, batch, Recompute(count), context=0, workspace=workspace)
        high = peak(found)
        kept = batch.before + sum(
            (batch.again if index < count else batch.plain)[index].kept
            for index in range(model.layers)
        )
        result: dict[str, Any] = {
            "case": f"{case.name}-{policy}", "layers": case.layers or model.layers,
            "recomputed": count, "predicted": high.bytes, "phase": high.phase,
            "owner": owner(high), "parts": high.parts, "static": vars_of(model.static),
            "library_bytes": workspace, "before": batch.before, "head": batch.head,
            "predicted_kept": kept, "plain": vars_of(batch.plain[-1]),
            "again": vars_of(batch.again[-1]), "moments": {m.phase: m.bytes for m in found},
            "plan_seconds": round(planning, 1),
        }  # fmt: skip
        if card is not None:
            result |= card.measured(count)
            result["error"] = round(result["predicted"] / result["measured"] - 1, 4)
            result |= machine()
        print("RESULT " + json.dumps(result), flush=True)


def vars_of(value: Any) -> dict[str, int]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def library_bytes(device: str) -> int:
    """Returns what products keep allocated: one workspace for each of two threads."""
    if device != "cuda":
        return 0
    from glasstune.planner.device import library_bytes as found

    return found()


class Card:
    """A model on the card, and its peaks."""

    def __init__(self, case: Case) -> None:
        import torch

        import gpu_step

        shapes()
        args = gpu_step.parse(
            ["--bits", str(case.bits), "--seq", str(case.length), "--batch", str(case.rows),
             "--layers", str(case.layers), "--way", case.way, "--device", "cuda",
             "--compute", case.compute]
        )  # fmt: skip
        args.model = case.model
        self.model = gpu_step.build(args)
        self.step = gpu_step.Step(self.model, args)
        self.base = torch.cuda.memory_allocated()
        gpu_step.put_way(self.model, args, args.way)

    def measured(self, layers: int) -> dict[str, Any]:
        """Runs updates with the first layers computed again; returns bytes and seconds."""
        import torch

        from glasstune.core.recompute import Recompute
        from glasstune.training.recompute import apply_recompute

        apply_recompute(self.model, Recompute(layers))
        step = self.step
        step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        static = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        step()  # compiles, and makes the optimiser's state
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
        free, total = torch.cuda.mem_get_info()
        return {
            "measured": max(resting + forward, resting + backward,
                            torch.cuda.max_memory_allocated()),
            "measured_first": first, "measured_base": self.base, "measured_static": static,
            "measured_resting": resting, "measured_kept": kept, "measured_forward": forward,
            "measured_backward": backward, "reserved": torch.cuda.max_memory_reserved(),
            "used_outside": total - free - torch.cuda.memory_reserved(),
            "seconds_a_step": round(seconds, 4), "build_seconds": round(begin - started, 1),
        }  # fmt: skip


def machine() -> dict[str, Any]:
    import gpu_step

    return gpu_step.machine("cuda")


CONTEXT = """
import torch
x = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
torch.nn.functional.silu(x @ x).float().softmax(-1).sum().item()
free, total = torch.cuda.mem_get_info()
print(total - free - torch.cuda.memory_reserved())
"""


def context_bytes() -> int:
    """Returns what the driver takes for one process; the card must be free of others."""
    done = subprocess.run([sys.executable, "-c", CONTEXT], stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def run_gpu(args: argparse.Namespace) -> int:
    if args.device == "cuda":
        print("RESULT " + json.dumps({"case": "context", "bytes": context_bytes()}), flush=True)
    cases = [case for case in gpu_cases(args.tiny) if not args.only or args.only in case.name]

    def run(case: Case) -> list[str]:
        command = [sys.executable, __file__, "gpu", "--device", args.device, "--case", case.name]
        done = subprocess.run(
            command + (["--tiny"] if args.tiny else []), stdout=subprocess.PIPE, text=True
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if done.returncode:
            lines.append("RESULT " + json.dumps({"case": case.name, "failed": done.returncode}))
        print("\n".join(lines), flush=True)
        return lines

    with ThreadPoolExecutor(args.workers) as pool:
        lines = [line for found in pool.map(run, cases) for line in found]
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    worst = max((abs(result.get("error") or 0.0) for result in results), default=1.0)
    failed = [result["case"] for result in results if "failed" in result]
    if args.device != "cuda":
        print(f"{len(results)} predictions, nothing measured, failed: {failed}", flush=True)
        return 1 if failed else 0
    print(f"{len(results)} cases, worst error {worst:.2%}, failed: {failed}", flush=True)
    return 0 if worst <= 0.05 and not failed else 1


CPU_CASES = {
    f"smollm2-{bits}-{rows}x{length}": (bits, rows, length)
    for bits, rows, length in (
        (16, 4, 128),
        (16, 4, 512),
        (4, 4, 128),
        (4, 4, 512),
        (8, 2, 512),
        (16, 8, 256),
    )
}
# Losses beside the next token's; an update of several is audited by term at the first one.
CPU_TERMS = {"smollm2-16-4x128-kl": "kl_to_base", "smollm2-16-4x256-z": "z_loss"}
CPU_CASES |= {"smollm2-16-4x128-kl": (16, 4, 128), "smollm2-16-4x256-z": (16, 4, 256)}
CPU_STEPS = 3


def cpu_case(bits: int, rows: int, length: int, term: str | None = None) -> dict[str, Any]:
    """Plans a run in this process, then trains a few updates in it."""
    import tempfile

    import torch

    import cpu_train
    from glasstune.core.choices import Choices
    from glasstune.core.config_load import config_from_mapping
    from glasstune.workflows.plan import plan_run
    from glasstune.workflows.prepare_run import prepare
    from glasstune.workflows.train import train

    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args = argparse.Namespace(data=None, rows=120)
        data = cpu_train.source(args, folder)
        content = {
            "model": {"path": cpu_train.smollm2(), "bits": bits, "device": "cpu"},
            "adapter": {"r": 8, "lora_alpha": 16},
            "data": {"sources": [{"path": str(data)}], "max_length": length},
            "training": {
                "output_dir": str(folder / "run"), "max_steps": CPU_STEPS,
                "train_batch_size": rows, "per_device_train_batch_size": rows,
                "recompute": "none",
            },
        }  # fmt: skip
        if term is not None:
            content["losses"] = [{"name": "next_token"}, {"name": term, "weight": 0.1}]
        config = config_from_mapping(content).config
        planned = plan_run(prepare(config, Choices(), cpu_train.Clock()), cpu_train.Clock())
        clock = cpu_train.Clock()
        train(config_from_mapping(content).config, progress=clock)
    from glasstune.core.memory import peak_resident_bytes

    record = planned.record
    measured = peak_resident_bytes()
    seconds = (clock.ended - clock.started) / CPU_STEPS
    return {
        "predicted": record.peak_bytes, "measured": measured,
        "error": round(record.peak_bytes / measured - 1, 4), "phase": record.phase,
        "parts": record.parts, "rows": record.rows, "length": record.length,
        "trained": record.trained_tokens, "recomputed": record.recompute_layers,
        "seconds_predicted": round(record.seconds_per_update, 2),
        "seconds_measured": round(seconds, 2), "rate": record.basis_of["seconds"],
    }  # fmt: skip


def run_cpu(args: argparse.Namespace) -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    if args.case is not None:
        print(
            "RESULT "
            + json.dumps(
                {"case": args.case, **cpu_case(*CPU_CASES[args.case], CPU_TERMS.get(args.case))}
            )
        )
        return 0
    worst = 0.0
    for name in CPU_CASES:
        if args.only and args.only not in name:
            continue
        command = [sys.executable, __file__, "cpu", "--case", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if done.returncode or not lines:
            print("RESULT " + json.dumps({"case": name, "failed": done.returncode}), flush=True)
            worst = 1.0
            continue
        print(lines[-1], flush=True)
        worst = max(worst, abs(json.loads(lines[-1].removeprefix("RESULT "))["error"]))
    print(f"worst error {worst:.2%}", flush=True)
    return 0 if worst <= 0.10 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("what", choices=("gpu", "cpu"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes at a time")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.what == "cpu":
        return run_cpu(args)
    if args.case is None:
        return run_gpu(args)
    case = next(case for case in gpu_cases(args.tiny) if case.name == args.case)
    gpu_case(case, args.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
