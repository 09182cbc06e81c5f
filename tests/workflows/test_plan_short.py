"""Memory that is short in spite of the plan: one clear message, and nothing saved is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import last_weights, same_bits

from glasstune.cli.main import run
from glasstune.core.memory import is_out_of_memory
from glasstune.training import loop, step
from glasstune.workflows import plan as plan_module

SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB"
CPU_SAYS = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
UPDATES = 4


def words_of(model: Path, data: Path, folder: Path) -> list[str]:
    file = folder / "config.yaml"
    file.write_text(
        f"model: {{path: {model}, device: cpu, dtype: float32}}\n"
        f"data: {{sources: [{{path: {data}}}], max_length: 128, validation_split: 0.2}}\n"
        f"training: {{output_dir: {folder / 'run'}, max_steps: {UPDATES}, save_steps: 100, "
        "eval_steps: 2, train_batch_size: 4, seed: 3}\n",
        encoding="utf-8",
    )
    return ["train", str(file), "--json", str(folder / "record.json")]


@pytest.fixture
def words(tiny_llama: Path, qa_file: Path, tmp_path: Path) -> list[str]:
    return words_of(tiny_llama, qa_file, tmp_path)


@pytest.fixture(scope="module")
def whole(
    tiny_llama: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Weights of the run that nothing breaks."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(words_of(tiny_llama, qa_file, folder)) == 0
    return last_weights(folder / "run")


def in_forward(patch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """Raises where the losses of the numbered update are computed, under its audit."""
    real, seen = step.term_sums, []

    def failing(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == number:
            raise error
        return real(*args)

    patch.setattr(step, "term_sums", failing)


def in_backward(patch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """Raises while the gradient of the numbered update comes to the last hidden state."""
    real, seen = step.term_sums, []

    def fail(_: torch.Tensor) -> None:
        raise error

    def failing(terms: Any, batch: Any) -> Any:
        seen.append(1)
        if len(seen) == number:
            batch.hidden.register_hook(fail)
        return real(terms, batch)

    patch.setattr(step, "term_sums", failing)


def in_evaluation(patch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    real, seen = loop.heldout_loss, []

    def failing(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == number:
            raise error
        return real(*args)

    patch.setattr(loop, "heldout_loss", failing)


def in_move(patch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """Raises in the optimiser's step, when a part of the adapters has moved."""
    real, seen = torch.optim.AdamW.step, []

    def failing(self: Any, closure: Any = None) -> Any:
        seen.append(1)
        if len(seen) < number:
            return real(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1.0)
        raise error

    patch.setattr(torch.optim.AdamW, "step", failing)


def in_loading(patch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    from glasstune.training import optimizer

    def failing(*_: Any) -> Any:
        raise error

    patch.setattr(optimizer, "make_optimizer", failing)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("moment", "number", "done", "saved"),
    [
        (in_loading, 1, None, None),
        (in_evaluation, 1, 0, None),
        (in_forward, 1, 0, None),
        (in_forward, 3, 2, 2),
        (in_backward, 4, 3, 3),
        (in_evaluation, 3, 4, 4),
        (in_move, 4, 3, 2),  # some tensors have moved: the best one, saved before, counts
    ],
)
def test_nothing_that_was_saved_is_lost(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, whole: dict[str, torch.Tensor], moment: Any,
    number: int, done: int | None, saved: int | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(plan_module, "SMALL", 0)
    with monkeypatch.context() as patch:
        moment(patch, number, torch.OutOfMemoryError(f"{SAYS}. GPU 0 has\nmore lines"))
        assert run(words) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    error = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["error"]
    assert error["code"] == "out_of_memory"
    assert error["message"].startswith(f"memory is short: {SAYS}")
    assert "this process held at most" in error["message"]
    assert "; planned were" in error["message"]
    assert "0 of 2 layers computed again" in error["message"]
    assert "training.max_memory:" in error["fix"]
    if done is None:
        assert error["where"] == "while the model is opened"
        assert not (tmp_path / "run").exists()
    else:
        assert error["where"] == f"after update {done} of {UPDATES}"
        expected = f"goes on from step-{saved}," if saved else "begins again"
        assert expected in error["fix"]
    again = [*words, "--resume"] if done is not None else words
    assert run(again) == 0
    assert same_bits(last_weights(tmp_path / "run"), whole)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row["step"] for row in map(json.loads, rows) if row["event"] == "train"]
    assert steps == list(range(1, UPDATES + 1))


def test_a_cpu_says_it_in_its_own_words(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        in_forward(patch, 1, RuntimeError(CPU_SAYS))
        assert run(words) == 1
    error = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["error"]
    assert error["code"] == "out_of_memory"
    assert "DefaultCPUAllocator" in error["message"]
    assert "planned were" not in error["message"]  # so small a run has no plan
    assert "training.recompute: full" in error["fix"]


def test_other_commands_say_it_too(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def short(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(SAYS)

    monkeypatch.setattr("glasstune.workflows.plan.prepare", short)
    assert run(["plan", words[1]]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert f"error: memory is short: {SAYS}" in printed


def test_real_errors_of_allocation_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.float32)
    assert is_out_of_memory(caught.value)
    wrapped = ValueError("inside a compiler")
    wrapped.__cause__ = caught.value
    assert is_out_of_memory(wrapped)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(None)
