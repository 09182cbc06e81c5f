"""What a start says of its ranks: idle GPUs, unlike devices, a strategy without ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import QuietProgress, tiny_run

from glasstune.core.choices import Choices
from glasstune.core.findings import Finding
from glasstune.core.ranks import Rank
from glasstune.training.distributed import ALONE, World
from glasstune.workflows.prepare_run import prepare
from glasstune.workflows.ranks import joined

CUDA: Any = SimpleNamespace(device=torch.device("cuda"), sharded=False)


class Told(World):
    """Two ranks, of which the other says what it is told to."""

    def __init__(self, other: Any, place: Rank) -> None:
        super().__init__(place)
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


@pytest.mark.parametrize(("local", "idle"), [(1, 3), (2, 2), (4, 0)])
def test_idle_gpus_are_a_finding(monkeypatch: pytest.MonkeyPatch, local: int, idle: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    world = ALONE if local == 1 else Told("Card", Rank(count=2, local_count=local))
    found: list[Finding] = []
    joined(world, CUDA, found.append)
    assert [item.code for item in found] == (["idle_gpus"] if idle else [])
    if idle:
        assert f"{idle} of 4 GPUs are idle" in found[0].message
        assert "--nproc all" in found[0].fix


def test_unlike_devices_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card A")
    found: list[Finding] = []
    record = joined(Told("Card B", Rank(count=2)), CUDA, found.append)
    assert [(item.code, item.severity) for item in found] == [("unlike_devices", "warning")]
    assert "Card A, Card B" in found[0].message
    assert record["devices"] == ["Card A", "Card B"]
    assert record["strategy"] == "ddp"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_strategy_for_one_process_is_said_to_do_nothing(
    tiny_llama, qa_file, tmp_path, strategy
) -> None:
    choices = Choices()
    training = {"distributed": {"strategy": strategy}}
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run", training=training)
    prepared = prepare(config, choices, QuietProgress())
    assert not prepared.sharded
    choice = choices.get("training.distributed.strategy")
    assert choice is not None
    assert "one process" in choice.reason
