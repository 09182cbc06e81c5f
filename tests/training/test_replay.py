"""When forwards are replayed and when not; the replay itself is stood in for on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glasstune.core.choices import Choices
from glasstune.training import replay
from glasstune.training.dropout import RowSeeds
from glasstune.training.replay import SEEN_FIRST, Replays


class Stand:
    """Stands for `GraphedForward`: counts captures and replays."""

    made: int = 0
    replayed: int = 0
    full: bool = False

    def __init__(self, run: Any, example: list[Tensor], parameters: list[Tensor]) -> None:
        if Stand.full:
            raise torch.OutOfMemoryError("full")
        self.run = run
        Stand.made += 1

    def __call__(self, *tensors: Tensor) -> Tensor:
        Stand.replayed += 1
        out: Tensor = self.run(*tensors)
        return out


class Clock:
    """Gives the times of one timed forward: start, launched, done."""

    def __init__(self, launched: float) -> None:
        self.times = iter((0.0, launched, 1.0))

    def perf_counter(self) -> float:
        return next(self.times)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    Stand.made = Stand.replayed = 0
    Stand.full = False
    monkeypatch.setattr(replay, "GraphedForward", Stand)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def make(launched: float = 0.9) -> tuple[Replays, nn.Linear, Any, Choices]:
        monkeypatch.setattr(replay, "time", Clock(launched))
        model, rows, choices = nn.Linear(4, 4), RowSeeds(), Choices()
        base = SimpleNamespace(weight=model.weight)
        group = SimpleNamespace(wide=torch.zeros(3), home=None, bases=[base])
        speed: Any = SimpleNamespace(groups=[group])
        replays = Replays(model, speed, list(model.parameters()), rows, choices)

        def run(inputs: Mapping[str, Any]) -> Tensor:
            out: Tensor = model(inputs["x"]) * inputs["by"] + rows.seeds.float().mean()
            return out

        return replays, model, run, choices

    return make


def inputs(rows: int = 2, by: float = 2.0) -> dict[str, Any]:
    return {"x": torch.randn(rows, 4), "by": by}


def test_a_forward_that_waits_for_its_kernels_is_replayed(made) -> None:
    replays, _, run, choices = made(launched=0.9)
    for _ in range(SEEN_FIRST + 1):
        replays(run, inputs())
    assert Stand.made == 0
    (choice,) = choices.to_list()
    assert choice["name"] == "training.cuda_graphs"
    assert choice["value"] is True
    assert "900 of its 1000 ms" in choice["reason"]
    given = inputs()
    assert torch.equal(replays(run, given), run(given))
    replays(run, inputs())
    assert (Stand.made, Stand.replayed) == (1, 2)


def test_a_forward_that_fills_the_device_is_not(made) -> None:
    replays, _, run, choices = made(launched=0.3)
    for _ in range(SEEN_FIRST + 3):
        replays(run, inputs())
    assert Stand.made == 0
    assert choices.to_list()[0]["value"] is False


def test_seeds_are_an_input(made) -> None:
    replays, _, run, _ = made()
    for _ in range(SEEN_FIRST + 2):
        replays(run, inputs())
    replays.rows.place(1, 0, 0, 1, "cpu")
    given = inputs()
    before = replays.rows.seeds
    assert torch.equal(replays(run, given), run(given))
    assert replays.rows.seeds is before
    assert Stand.made == 1


def test_who_watches_evaluates_or_moves_weights(made) -> None:
    replays, model, run, _ = made()
    for _ in range(SEEN_FIRST + 2):
        replays(run, inputs())
    replayed = Stand.replayed
    seen = []
    hook = model.register_forward_hook(lambda *_: seen.append(1))
    replays(run, inputs())
    hook.remove()
    assert seen == [1]
    with torch.no_grad():
        replays(run, inputs())
    model.eval()
    replays(run, inputs())
    model.train()
    assert Stand.replayed == replayed
    replays.speed.groups[0].wide = torch.zeros(3)  # released and made again
    replays(run, inputs())
    assert (Stand.made, Stand.replayed) == (2, replayed + 1)


def test_float8_weights_that_moved_are_captured_again(made) -> None:
    replays, _, run, _ = made()
    held = [torch.zeros(3), torch.zeros(5)]
    replays.speed.groups[0].home = SimpleNamespace(tensors=lambda: held)
    for _ in range(SEEN_FIRST + 3):
        replays(run, inputs())
    assert Stand.made == 1
    held[1] = torch.ones(5)  # LoRA's columns of an adapter of another rank
    replays(run, inputs())
    assert Stand.made == 2


def test_other_shapes_and_constants_have_graphs_of_their_own(made) -> None:
    replays, _, run, _ = made()
    for _ in range(SEEN_FIRST + 2):
        replays(run, inputs())
    for given in (inputs(rows=3), inputs(by=3.0), inputs(rows=5)):
        for _ in range(SEEN_FIRST + 2):
            assert torch.equal(replays(run, given), run(given))
    assert Stand.made == replay.SHAPES


def test_no_memory_is_said_and_training_goes_on(made) -> None:
    replays, _, run, choices = made()
    Stand.full = True
    for _ in range(SEEN_FIRST + 3):
        given = inputs()
        assert torch.equal(replays(run, given), run(given))
    assert choices.to_list()[-1]["value"] is False
    assert "no memory" in choices.to_list()[-1]["reason"]
