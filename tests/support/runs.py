"""Small training runs for tests: a config around a tiny model, and what came of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glasstune.core.config import Config


def tiny_run(model: Path, data: Path, output: Path, /, **sections: dict[str, Any]) -> Config:
    """A config of 3 epochs of small updates in fp32; sections override key by key."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "dtype": "float32"},
        "adapter": {"r": 4, "lora_alpha": 8},
        "data": {"sources": [{"path": str(data)}], "max_length": 128, "validation_split": 0.1},
        "training": {
            "output_dir": str(output),
            "num_train_epochs": 3,
            "train_batch_size": 4,
            "learning_rate": 5e-3,
            "seed": 3,
        },
    }
    losses = sections.pop("losses", None)
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    if losses is not None:
        base["losses"] = losses  # type: ignore[assignment]
    return Config(**base)


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads an adapter's weights with safetensors itself."""
    return load_file(folder / "adapter_model.safetensors")


def last_weights(output: Path) -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint."""
    steps = sorted(int(path.name.split("-")[1]) for path in (output / "checkpoints").glob("step-*"))
    return adapter_weights(output / "checkpoints" / f"step-{steps[-1]}")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative distance over tensors."""
    assert one.keys() == other.keys()
    return max(
        float((one[key] - other[key]).norm() / other[key].norm().clamp(min=1e-30)) for key in one
    )


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` of one kind."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == kind]


def missing(what: str) -> None:
    """Skips, or fails where the CI asks for everything."""
    if os.environ.get("GLASSTUNE_REQUIRE"):
        pytest.fail(f"{what} is missing and GLASSTUNE_REQUIRE is set")
    pytest.skip(f"{what} is missing")


class QuietProgress:
    """A progress that only remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, task: str, total: int | None, unit: str) -> None: ...

    def advance(self, task: str, amount: int = 1, **fields: float | str) -> None: ...

    def finish(self, task: str) -> None: ...

    def say(self, text: str) -> None:
        self.lines.append(text)


class StopAfter(QuietProgress):
    """A progress that sends this process a signal once `updates` updates were made."""

    def __init__(self, updates: int, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.left = updates
        self.number = number

    def advance(self, task: str, amount: int = 1, **fields: float | str) -> None:
        if task == "train" and fields:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)
