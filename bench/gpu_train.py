"""Real training, ours against a plain transformers + PEFT loop: held-out loss and real tokens/s.

    python bench/gpu_train.py --model DIR --data alpaca.json                      # both parts
    python bench/gpu_train.py --model DIR --data alpaca.json --part loss --seeds 0,1,2
    python bench/gpu_train.py --model DIR --data alpaca.json --part speed --bits 4
    python bench/gpu_train.py --model TINY --data F --device cpu --updates 4      # a look

`loss`: for each seed 200 updates by `gt.train` (packed, compiled) and by the loop (padded, eager,
bf16 autocast) over the same documents in the same updates, with the same LoRA options, learning
rates and clipping; both adapters are then measured on the same held-out rows by transformers and
PEFT alone. `speed`: real tokens (padding not counted) a second after the first updates, packed
against padded; the loop's batch is the best of `--peer-rows`.

Each case runs in a process of its own and prints one line, `RESULT {json}`; the last line has the
means and standard deviations. No network is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RATE, MAX_LENGTH, HELD_OUT = 2e-4, 1024, 0.05


class Log:
    """A Progress that writes what is said to stderr."""

    def start(self, task: str, total: int | None, unit: str) -> None:
        """Does nothing."""

    def advance(self, task: str, amount: int = 1, **fields: float | str) -> None:
        """Does nothing."""

    def finish(self, task: str) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Writes a line."""
        print(text, file=sys.stderr)


def settings(args: argparse.Namespace, output: Path) -> Any:
    """The configuration of a run; the loop takes its rows, rates and options from it too."""
    from glasstune.core.config_load import config_from_mapping

    return config_from_mapping(
        {
            "model": {"path": str(args.model), "bits": args.bits, "device": args.device},
            "adapter": {"r": args.rank, "lora_alpha": 2 * args.rank},
            "data": {
                "sources": [{"path": str(args.data)}],
                "validation_split": HELD_OUT,
                "max_length": args.max_length,
            },
            "training": {
                "output_dir": str(output),
                "max_steps": args.updates,
                "train_batch_size": args.packs,
                "learning_rate": RATE,
                "seed": args.seed,
                "compile": {"auto": "auto", "true": True, "false": False}[args.compile],
                "eval_on_start": False,
                "eval_steps": args.updates,
                "save_steps": args.updates,
                "load_best_model_at_end": False,
            },
        }
    ).config


def prepared(args: argparse.Namespace) -> Any:
    """Rows, tokenizer and schedule as `gt.train` makes them."""
    from glasstune.core.choices import Choices
    from glasstune.workflows.prepare_run import prepare

    return prepare(settings(args, Path("unused")), Choices(), Log())


def updates_of(run: Any, args: argparse.Namespace) -> Iterator[list[Any]]:
    """The documents of each update, in the order of `gt.train`."""
    from glasstune.training.batching import updates

    stream = updates(run.schedule, run.data.train, args.seed, 0, 0, 0, run.pad_id)
    for _, update in zip(range(args.updates), stream, strict=False):
        yield [document for batch in update.micro_batches for document in batch.documents]


def plain_model(args: argparse.Namespace, adapter: Path | None) -> Any:
    """Transformers and PEFT as their pages say: 16 bit, or NF4 prepared for training."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if args.bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    if args.bits == 8:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if args.device == "cuda":
        options["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(str(args.model), **options)
    model.config.use_cache = False
    if adapter is not None:
        return PeftModel.from_pretrained(model, str(adapter))
    if args.bits < 16:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if args.peer_recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(args.seed)
    lora = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def padded(documents: list[Any], pad_id: int, device: str) -> dict[str, Any]:
    """Documents as rows of the longest one's length; labels as transformers wants them."""
    import torch

    length = max(len(document) for document in documents)
    ids = torch.full((len(documents), length), pad_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.from_numpy(document.ids.astype("int64"))
        labels[row, : len(document)] = torch.from_numpy(document.labels.astype("int64"))
        mask[row, : len(document)] = 1
    return {
        name: tensor.to(device)
        for name, tensor in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))
    }


def loss_sum(model: Any, batch: dict[str, Any]) -> Any:
    """Sum of the token losses, float32."""
    import torch

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def precision(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """bf16 autocast of the device."""
    import torch

    return torch.autocast(args.device, torch.bfloat16) if args.bits else nullcontext()


def held_out(model: Any, run: Any, args: argparse.Namespace) -> float:
    """Mean loss over the trained tokens of the held-out rows."""
    import torch

    data = run.data.validation
    batch = data.micro_batch(range(data.rows), 0, run.pad_id)
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad(), precision(args):
        for start in range(0, len(batch.documents), 8):
            part = list(batch.documents[start : start + 8])
            total += float(loss_sum(model, padded(part, run.pad_id, args.device)))
            count += sum(document.trained_tokens for document in part)
    return total / count


def train_loop(args: argparse.Namespace, run: Any, peer_rows: int) -> tuple[Any, dict[str, Any]]:
    """The plain loop; returns the model and what was measured after the first updates."""
    import torch

    from glasstune.training.schedule import learning_rate

    model = plain_model(args, None).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    config = settings(args, Path("unused")).training
    tokens, losses, seconds = 0, [], 0.0
    for step, documents in enumerate(updates_of(run, args), start=1):
        started = time.monotonic()
        count = sum(document.trained_tokens for document in documents)
        total = torch.zeros((), device=args.device)
        for start in range(0, len(documents), peer_rows):
            batch = padded(documents[start : start + peer_rows], run.pad_id, args.device)
            with precision(args):
                part = loss_sum(model, batch) / count
            part.backward()
            total += part.detach()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, args.updates)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))  # waits for the device
        if step > args.warm:
            tokens += sum(len(document) for document in documents)
            seconds += time.monotonic() - started
    return model, {"losses": losses, "tokens_per_second": tokens / seconds if seconds else None}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """`gt.train`, then its adapter in transformers and PEFT alone."""
    from glasstune.workflows.train import train

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        started = time.monotonic()
        train(settings(args, output), progress=Log())
        seconds = time.monotonic() - started
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["event"] == "train"]
        late = [row for row in rows if row["step"] > args.warm]
        spent = sum(row["step_seconds"] for row in late)
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        ways: dict[str, int] = {}
        for module in record["speed"]["modules"]:
            ways[module["way"]] = ways.get(module["way"], 0) + 1
        found = {
            "losses": [row["loss"] for row in rows],
            "tokens_per_second": sum(row["tokens"] for row in late) / spent if spent else None,
            "step_ms": 1000 * statistics.median(row["step_seconds"] for row in late)
            if late
            else None,
            "run_seconds": seconds,
            "ways": ways,
            "compiled": len(record["speed"]["compiled"]),
            "peak_bytes": rows[-1]["peak_memory_bytes"],
        }
        if args.part == "loss":
            found["held_out"] = held_out(
                plain_model(args, output / "adapter"), prepared(args), args
            )
    return found


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """The plain loop at one number of rows a forward."""
    import torch

    run = prepared(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    model, found = train_loop(args, run, args.peer_rows[0])
    found["run_seconds"] = time.monotonic() - started
    found["peer_rows"] = args.peer_rows[0]
    if args.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    if args.part == "loss":
        found["held_out"] = held_out(model, run, args)
    return found


def child(args: argparse.Namespace) -> None:
    """Runs one case and prints its line."""
    import torch

    found = ours(args) if args.case == "ours" else peer(args)
    card = torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu"
    losses = found.pop("losses")
    line = {
        "case": args.case, "part": args.part, "seed": args.seed, "bits": args.bits,
        "updates": args.updates, **found, "first_losses": losses[:3], "last_loss": losses[-1],
        "card": card, "versions": versions(),
    }  # fmt: skip
    print("RESULT " + json.dumps(line), flush=True)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "glasstune"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure(args: argparse.Namespace, case: str, seed: int, peer_rows: int) -> dict[str, Any]:
    """Runs a case in a process of its own; a failed one has its error's last line."""
    options = (
        f"--case {case} --seed {seed} --peer-rows {peer_rows} --part {args.part} "
        f"--bits {args.bits} --device {args.device} --updates {args.updates} "
        f"--packs {args.packs} --rank {args.rank} "
        f"--max-length {args.max_length} --compile {args.compile} --warm {args.warm}"
    ).split()
    options += ["--peer-recompute"] if args.peer_recompute else []
    command = [
        sys.executable, __file__, "--model", str(args.model), "--data", str(args.data), *options
    ]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            print(line, flush=True)
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    lines = done.stderr.strip().splitlines() or ["nothing was printed"]
    failed = {"case": case, "part": args.part, "seed": seed, "error": lines[-1][:300]}
    print("RESULT " + json.dumps(failed), flush=True)
    print("\n".join(lines[-15:]), file=sys.stderr)
    return failed


def compare_losses(args: argparse.Namespace) -> dict[str, Any]:
    """All seeds of both sides."""
    summary: dict[str, Any] = {"part": "loss", "seeds": args.seeds}
    for case in ("ours", "peer"):
        found = [measure(args, case, seed, args.peer_rows[-1]) for seed in args.seeds]
        losses = [one["held_out"] for one in found if "held_out" in one]
        if losses:
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            summary[case] = {"mean": statistics.mean(losses), "sd": spread, "losses": losses}
    if "ours" in summary and "peer" in summary:
        summary["difference"] = summary["ours"]["mean"] - summary["peer"]["mean"]
    return summary


def compare_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Ours against the best batch of the loop."""
    mine = measure(args, "ours", args.seeds[0], args.peer_rows[0])
    theirs = [measure(args, "peer", args.seeds[0], rows) for rows in args.peer_rows]
    best = max((one.get("tokens_per_second") or 0.0 for one in theirs), default=0.0)
    speed = mine.get("tokens_per_second") or 0.0
    return {
        "part": "speed", "ours": speed, "peer": best,
        "ratio": speed / best if best else None,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    """Reads the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", choices=("both", "loss", "speed"), default="both")
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), default=16)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--packs", type=int, default=4, help="packs of an update")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH)
    parser.add_argument("--compile", choices=("auto", "true", "false"), default="auto")
    parser.add_argument("--warm", type=int, help="first updates that are not timed")
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2])
    parser.add_argument("--peer-rows", type=_numbers, default=[8, 16, 32])
    parser.add_argument("--peer-recompute", action="store_true")
    parser.add_argument("--case", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.warm is None:
        args.warm = min(20, args.updates // 2)
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Runs the parts that were asked for."""
    args = parse()
    if args.case:
        child(args)
        return
    for part in ("loss", "speed") if args.part == "both" else (args.part,):
        args.part = part
        summary = compare_losses(args) if part == "loss" else compare_speed(args)
        print("RESULT " + json.dumps({"case": "summary", **summary}), flush=True)


if __name__ == "__main__":
    main()
