"""One training step of a LoRA model of a real shape on a GPU: milliseconds, peak bytes, gradients.

    python bench/gpu_step.py --model llama8b --bits 4 --batch 4 --seq 2048
    python bench/gpu_step.py --model bloom2b6 --bits 16 --batch 8 --seq 1024 --budget 0.5
    python bench/gpu_step.py --model llama8b --layers 4 --bits 4 --check
    python bench/gpu_step.py --model llama8b --bits 16 --profile step.txt

Weights are random and made on the device; nothing is downloaded. `--way` runs ours (`fast`), the
same PEFT model with its blocks compiled and no group (`compiled`), or PEFT as it is (`eager`), all
with the same loss, tokens and optimiser. The last line printed is `RESULT {json}`. With `--check`
gradients of all three ways of the same weights are compared with float32 mathematics, and the exit
code is 1 where ours are more than twice as far from it as eager's. A packed base has float8
products (`--compute fp8`) in our groups alone: there ours may be 0.1 away.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RANK, ALPHA, RATE = 16, 32, 1e-4
FAR_FP8 = 0.1  # one rounding to 4 bits is 0.026 away

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama8b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
         "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
         "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    # Baichuan2's sizes; `llama7b` is the same model with a projection for each of q, k and v.
    "llama7b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 125696,
         "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    ),
    "baichuan7b": (
        "baichuan",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "vocab_size": 125696, "max_position_embeddings": 4096},
    ),
    "baichuan13b": (
        "baichuan",
        {"hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40,
         "num_attention_heads": 40, "vocab_size": 125696, "model_max_length": 4096},
    ),
    "bloom2b6": ("bloom", {"hidden_size": 2560, "n_layer": 30, "n_head": 32, "vocab_size": 46145}),
    "toy": (
        "llama",
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500},
    ),
}  # fmt: skip


def build(args: argparse.Namespace) -> Any:
    """Makes the adapted model on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from glasstune.adapters.inject import add_adapter, keep_activation_dtype
    from glasstune.core.recompute import Recompute
    from glasstune.models.families.install import install_packing
    from glasstune.models.families.native import register_native
    from glasstune.models.head import fold_head
    from glasstune.training.recompute import apply_recompute, decoder_layers

    kind, options = SHAPES[args.model]
    register_native(kind)
    layers = "n_layer" if "n_layer" in options else "num_hidden_layers"
    if args.layers:
        options = {**options, layers: args.layers}
    torch.manual_seed(0)
    with torch.device(args.device):
        config = AutoConfig.for_model(kind, **options)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.config.use_cache = False
    if args.save:
        save(model, args.save)
    pack(model, args.bits)
    if args.compute == "fp8":
        from glasstune.models.fp8 import convert_to_fp8, mark_fp8

        if args.bits == 16:
            convert_to_fp8(model, None)
        else:  # the groups of `fast` expand packed weights to float8; other ways stay 16 bit
            mark_fp8(model)
    if args.device == "cuda":
        install_packing(model, compiled=True)
    model = add_adapter(model, r=args.rank, lora_alpha=ALPHA)
    fold_head(model)
    keep_activation_dtype(model)
    if args.recompute:
        layers = len(decoder_layers(model)) if args.recompute < 0 else args.recompute
        apply_recompute(model, Recompute(layers, args.offload))
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return model.train()


def save(model: Any, folder: Path) -> None:
    """Writes the weights, and a tokenizer of one word: some peers load no folder without one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    special = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>", "unk_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def pack(model: Any, bits: int) -> None:
    """Packs the linear layers at 8 bit (W8A16) or 4 bit (NF4, double quantisation)."""
    if bits == 8:
        from glasstune.models.int8 import convert_to_int8

        convert_to_int8(model, None)
    if bits != 4:
        return
    import bitsandbytes as bnb

    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer is model.get_output_embeddings():
            continue
        packed = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta",
            compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True,
        )  # fmt: skip
        weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        packed.weight = weight.to(layer.weight.device)
        packed.bias = layer.bias
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(path, packed)
    model.is_loaded_in_4bit = True


class Step:
    """Forward, backward and update of one batch."""

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        from glasstune.models.families.install import packing_kwargs
        from glasstune.models.head import HeadSplit

        self.model, self.split = model, HeadSplit(model)
        self.device, self.autocast = args.device, True
        self.graph: Any = None
        vocabulary = self.split.weight.shape[0]
        generator = torch.Generator(device=args.device).manual_seed(1)
        size = (args.batch, args.seq)
        self.ids = torch.randint(0, vocabulary, size, device=args.device, generator=generator)
        self.places = torch.arange(args.seq, device=args.device).expand(size)
        bounds = tuple((0, args.seq) for _ in range(args.batch))
        self.extra = packing_kwargs(model, bounds, args.device)
        self.targets = self.ids.roll(-1, 1).reshape(-1)
        weights = torch.ones(size, device=args.device)
        weights[:, -1] = 0
        self.weights = (weights / weights.sum()).reshape(-1)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, fused=args.device == "cuda")

    def loss(self) -> Tensor:
        """Returns the mean loss of the batch."""
        from glasstune.kernels.linear_cross_entropy import linear_cross_entropy

        run = self.hidden if self.graph is None else self.graph
        with self.precision():
            hidden = run(self.ids, self.places)
            hidden = hidden.reshape(-1, hidden.shape[-1]).to(self.split.weight.dtype)
            total, _ = linear_cross_entropy(hidden, self.split.weight, self.targets, self.weights)
        return total

    def hidden(self, ids: Tensor, places: Tensor) -> Tensor:
        """Runs the model before its head, [batch, seq, hidden]."""
        inputs: dict[str, Any] = {"input_ids": ids, **self.extra}
        if self.model.config.model_type != "bloom":  # ALiBi has no positions
            inputs["position_ids"] = places
        with self.precision():
            return self.split.hidden(self.model, **inputs)

    def precision(self) -> AbstractContextManager[Any]:
        """Returns bf16 autocast, or nothing for float32."""
        return torch.autocast(self.device, torch.bfloat16) if self.autocast else nullcontext()

    def __call__(self) -> Tensor:
        """Makes one update and returns its loss, still on the device."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def capture(self) -> None:
        """Lets later calls replay the backbone as CUDA graphs."""
        from glasstune.fast.graphs import GraphedForward

        self.graph = GraphedForward(self.hidden, [self.ids, self.places], self.trained)

    def gradients(self) -> list[Tensor]:
        """Returns the gradient of every trained tensor, on the CPU."""
        self.loss().backward()
        found = [p.grad.double().cpu() for p in self.trained if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return found


def put_way(model: Any, args: argparse.Namespace, way: str) -> Any:
    """Speeds the model up as asked; returns the report or None."""
    from glasstune.fast.speed_up import speed_up

    if way == "eager":
        return None
    options: dict[str, Any] = {"dynamic": False}
    if args.backend:
        options["backend"] = args.backend
    report = speed_up(
        model, compile=args.compile, memory_budget=args.budget, compile_options=options
    )
    if way == "compiled":  # the blocks stay compiled, the groups go
        from glasstune.fast.members import detach

        detach(report.groups, [])
        for region in report.record.compiled:
            model.get_submodule(region)._compiled_call_impl.groups = []
    return report


def timed(step: Step, count: int, device: str) -> list[float]:
    """Returns the milliseconds of each of `count` updates."""
    found = []
    for _ in range(count):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            step()
            found.append((time.perf_counter() - start) * 1e3)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Builds, warms up, times; returns the result."""
    model = build(args)
    step = Step(model, args)
    base = torch.cuda.memory_allocated() if args.device == "cuda" else None
    start = time.perf_counter()
    report = put_way(model, args, args.way)
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses = [round(float(step()), 4) for _ in range(3)]
    cold = time.perf_counter() - start
    if args.graph:
        step.capture()
    times = timed(step, args.steps, args.device)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    median = statistics.median(times)
    ways = Counter(module.way for module in report.record.modules) if report else {}
    result = {
        "way": args.way, "model": args.model, "layers": args.layers, "bits": args.bits,
        "compute": args.compute, "seq": args.seq, "batch": args.batch, "budget": args.budget,
        "rank": args.rank, "recompute": args.recompute, "offload": args.offload,
        "graph": args.graph,
        "ms": round(median, 1), "ms_min": round(min(times), 1),
        "tokens_per_second": round(args.batch * args.seq / median * 1e3),
        "peak_bytes": peak, "base_bytes": base, "losses": losses, "cold_seconds": round(cold, 1),
        "modules": dict(ways), "compiled": len(report.record.compiled) if report else 0,
    }  # fmt: skip
    if args.profile:
        result["busy_ms"] = profile(step, args)
    if step.graph is not None:  # the same weights, with and without the replay
        here = step.gradients()
        step.graph = None
        result["replay_equal"] = all(map(torch.equal, here, step.gradients()))
    return result


def profile(step: Step, args: argparse.Namespace) -> float:
    """Writes the table of one update's kernels and returns their milliseconds."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kind = "cuda" if args.device == "cuda" else "cpu"
    with record(activities=[getattr(ProfilerActivity, kind.upper())]) as seen:
        step()
        if kind == "cuda":
            torch.cuda.synchronize()
    averages = seen.key_averages()
    table = averages.table(
        sort_by=f"self_{kind}_time_total", row_limit=60, max_name_column_width=110
    )
    args.profile.write_text(table, encoding="utf-8")
    name = "self_device_time_total" if kind == "cuda" else "self_cpu_time_total"
    return round(sum(getattr(event, name) for event in averages) / 1e3, 1)


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Compares the gradients of each way with float32 mathematics on the same weights."""
    model = build(args)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.01
            parameter.data.copy_(drawn)
    step = Step(model, args)
    found: dict[str, list[Tensor]] = {}
    for way in ("eager", "compiled", "fast"):
        report = put_way(model, args, way)
        found[way] = step.gradients()
        if report is not None:
            report.undo()
    widen(model)
    step.autocast = False
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    truth = step.gradients()
    torch.backends.cuda.matmul.allow_tf32 = before
    far = {way: distance(grads, truth) for way, grads in found.items()}
    alone = args.compute == "fp8" and args.bits != 16
    limit = FAR_FP8 if alone else 2 * far["eager"]
    return {
        "check": True, "model": args.model, "layers": args.layers, "bits": args.bits,
        "compute": args.compute,
        "seq": args.seq, "batch": args.batch, "distance": far,
        "ratio": round(far["fast"] / far["eager"], 3), "ok": far["fast"] <= limit,
    }  # fmt: skip


def widen(model: Any) -> None:
    """Makes every weight float32, packed ones by what they stand for."""
    from bitsandbytes.functional import dequantize_4bit

    from glasstune.kernels.fp8.numbers import power_scales, to_rows
    from glasstune.models.packed import is_four_bit

    for path, layer in list(model.named_modules()):
        if is_four_bit(layer):
            state = copy.copy(layer.weight.quant_state)
            state.dtype = torch.float32
            weight = dequantize_4bit(layer.weight.data, state)
        elif type(layer).__name__ in ("Int8Linear", "Fp8Linear"):
            weight = layer.dequantize()
        else:
            continue
        if getattr(layer, "_glasstune_fp8", False):
            scale = power_scales(weight.float())
            weight = to_rows(weight, scale).float() * scale[:, None]
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        plain.weight = nn.Parameter(weight.float(), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(path, plain)
    model.float()


def distance(grads: list[Tensor], truth: list[Tensor]) -> float:
    """Returns the root of the mean squared relative distance, every tensor counting alike."""
    squares = [
        float((grad - right).norm() / right.norm().clamp(min=1e-30)) ** 2
        for grad, right in zip(grads, truth, strict=True)
    ]
    return (sum(squares) / len(squares)) ** 0.5


def machine(device: str) -> dict[str, Any]:
    """Returns the card and the versions."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    card = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"card": card, "versions": versions}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--model", choices=SHAPES, default="llama8b")
    parser.add_argument("--way", choices=("fast", "compiled", "eager"), default="fast")
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), default=16)
    parser.add_argument("--compute", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=0, help="0 = all")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--budget", type=float, help="activation_memory_budget, 0 to 1")
    parser.add_argument("--compile", choices=("true", "false", "auto"), default="true")
    parser.add_argument(
        "--recompute", type=int, default=0, help="layers made again in the backward; -1 = all"
    )
    parser.add_argument("--offload", action="store_true", help="their inputs wait on the host")
    parser.add_argument("--save", type=Path, help="folder for the 16-bit weights, then go on")
    parser.add_argument("--graph", action="store_true", help="replay the step as a CUDA graph")
    parser.add_argument("--backend", help="of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", type=Path, help="file for the table of kernels")
    args = parser.parse_args(argv)
    args.compile = {"true": True, "false": False}.get(args.compile, args.compile)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    result = (check if args.check else measure)(args)
    print("RESULT " + json.dumps({**result, **machine(args.device)}), flush=True)
    return 0 if result.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
