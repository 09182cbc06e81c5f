"""Metric sinks beside `metrics.jsonl`, with the metric names of transformers' Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glasstune.core.errors import InputError
from glasstune.core.protocols import MetricsWriter

_TRAIN = (
    "loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "tokens_per_second",
    "peak_memory_bytes",
)


def named_values(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields a metric event's numbers under transformers' names.

    `train/loss`, `train/learning_rate`, `train/grad_norm`, `train/epoch`, `eval/loss`; terms of
    the loss are `train/losses/<name>`. Values that JSON has no number for are left out.
    """
    kind = event.get("event")
    if kind == "train":
        for name in _TRAIN:
            yield from _number(f"train/{name}", event.get(name))
        for name, value in (event.get("losses") or {}).items():
            yield from _number(f"train/losses/{name}", value)
    elif kind == "eval":
        yield from _number("eval/loss", event.get("eval_loss"))
        yield from _number("eval/tokens", event.get("eval_tokens"))


def _number(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)


class TensorBoardWriter:
    """Writes TensorBoard event files below `<run>/tensorboard`.

    Args:
        folder: The run folder.
        run_name: Name of the run inside TensorBoard; None leaves it out.
    """

    def __init__(self, folder: Path, run_name: str | None = None) -> None:
        module = _needed("torch.utils.tensorboard", "tensorboard")
        target = folder / "tensorboard" / run_name if run_name else folder / "tensorboard"
        self._writer = module.SummaryWriter(log_dir=str(target))

    def write(self, event: Mapping[str, Any]) -> None:
        """Takes one event; its `step` is the x axis."""
        for name, value in named_values(event):
            self._writer.add_scalar(name, value, global_step=int(event["step"]))

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class WandbWriter:
    """Writes to Weights & Biases."""

    def __init__(self, folder: Path, run_name: str | None = None) -> None:
        wandb = _needed("wandb", "wandb")
        self._run = wandb.init(project="glasstune", name=run_name, dir=str(folder))

    def write(self, event: Mapping[str, Any]) -> None:
        """Takes one event."""
        values = dict(named_values(event))
        if values:
            # Evaluation and training may report the same step: wandb keeps its own counter.
            self._run.log({**values, "train/global_step": int(event["step"])})

    def close(self) -> None:
        """Flushes and closes."""
        self._run.finish()


class MlflowWriter:
    """Writes to the tracking server that `MLFLOW_TRACKING_URI` names."""

    def __init__(self, folder: Path, run_name: str | None = None) -> None:
        self._mlflow = _needed("mlflow", "mlflow")
        self._mlflow.start_run(run_name=run_name or folder.name)

    def write(self, event: Mapping[str, Any]) -> None:
        """Takes one event."""
        values = dict(named_values(event))
        if values:
            self._mlflow.log_metrics(values, step=int(event["step"]))

    def close(self) -> None:
        """Flushes and closes."""
        self._mlflow.end_run()


_WRITERS: dict[str, Callable[[Path, str | None], MetricsWriter]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
    "mlflow": MlflowWriter,
}


def make_writers(
    report_to: Sequence[str], run_folder: Path, run_name: str | None = None
) -> list[MetricsWriter]:
    """Opens the sinks that `training.report_to` names.

    Raises:
        InputError: `not_installed`: the package of a sink is missing.
    """
    return [_WRITERS[name](run_folder, run_name) for name in dict.fromkeys(report_to)]


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            "not_installed",
            f"{package} is not installed ({error})",
            where="training.report_to",
            fix=f"pip install {package}, or take it out of training.report_to",
        ) from None
