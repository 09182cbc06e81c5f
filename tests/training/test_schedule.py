"""Learning rate, update sizes and row dropout: pure functions with hand-worked answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glasstune.core.choices import Choices
from glasstune.core.config import Config, TrainingConfig
from glasstune.data.packing import PackedSet
from glasstune.training.batching import Schedule, make_schedule
from glasstune.training.dropout import mix
from glasstune.training.schedule import learning_rate


def rates(total: int, **options: object) -> list[float]:
    config = TrainingConfig(learning_rate=1.0, **options)
    return [learning_rate(config, step, total) for step in range(1, total + 1)]


def test_e05_the_first_update_is_never_at_rate_zero() -> None:
    assert rates(5, warmup_steps=3)[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(rate > 0 for rate in rates(100, warmup_steps=0.03))


def test_cosine_and_linear_by_hand() -> None:
    assert rates(4, warmup_steps=0) == pytest.approx(
        [1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4))]
    )
    assert rates(4, warmup_steps=0, lr_scheduler_type="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(4, warmup_steps=2, lr_scheduler_type="constant_with_warmup") == [0.5, 1, 1, 1]
    assert rates(3, warmup_steps=2, lr_scheduler_type="constant") == [1, 1, 1]


def test_updates_cover_each_row_once_with_a_short_last_one() -> None:
    schedule = Schedule(rows=21, batch=8, micro=3, epochs=2, max_steps=-1)
    assert schedule.update_sizes(0, 0) == [8, 8, 5]
    assert schedule.micro_sizes(8) == [3, 3, 2]
    assert schedule.total == 6
    assert schedule.update_sizes(1, 8) == [8, 5]


def test_fraction_of_an_epoch_and_max_steps() -> None:
    assert Schedule(10, 4, 4, 1.5, -1).total == 3 + 2
    assert Schedule(10, 4, 4, 1.5, -1).update_sizes(1, 0) == [4, 1]
    assert Schedule(10, 4, 4, 0.25, -1).total == 1
    assert Schedule(10, 4, 4, 3, 7).total == 7


def test_a_small_data_set_gets_a_smaller_batch_and_the_user_is_obeyed() -> None:
    choices = Choices()
    data = PackedSet((), tuple(np.zeros(1, np.int32) for _ in range(73)), True, 1024)
    config = Config(model={"path": "m"}, data={"sources": [{"path": "d"}]})
    schedule = make_schedule(config, data, "cpu", choices)
    assert schedule.batch == config.training.train_batch_size == 4
    assert schedule.updates_per_epoch == 19
    assert "5 updates an epoch" in choices.get("training.train_batch_size").reason
    asked = Config(
        model={"path": "m"}, data={"sources": [{"path": "d"}]}, training={"train_batch_size": 16}
    )
    assert make_schedule(asked, data, "cpu", Choices()).batch == 16


@pytest.mark.parametrize(
    ("batch", "length", "micro"),
    [(16, 512, 4), (7, 512, 4), (6, 512, 3), (5, 1024, 2), (8, 4096, 1)],
)
def test_forwards_are_equal_parts_that_fit(batch: int, length: int, micro: int) -> None:
    data = PackedSet((), tuple(np.zeros(1, np.int32) for _ in range(73)), True, length)
    config = Config(
        model={"path": "m"}, data={"sources": [{"path": "d"}]},
        training={"train_batch_size": batch},
    )  # fmt: skip
    assert make_schedule(config, data, "cpu", Choices()).micro == micro


def test_seeds_are_stable_across_processes() -> None:
    assert mix(0, 1, 2, "a") == mix(0, 1, 2, "a")
    assert mix(0, 12, "a") != mix(0, 1, "2a")
