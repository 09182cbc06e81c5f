"""The peak of a run, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

from glasstune.core.recompute import Recompute
from glasstune.planner.choose import fastest, policy_name, reason, ways
from glasstune.planner.peak import (
    Activations,
    Static,
    moments,
    owner,
    peak,
    step_flops,
    step_traffic,
)
from glasstune.planner.several import NCCL_BYTES, ddp, fsdp2
from glasstune.planner.watch import BlockBytes

STATIC = Static(base=1000, wide=10, adapters=40, gradients=40, optimizer=80, load=300, largest=5)
PLAIN = BlockBytes(kept=100, forward=130, backward=160, gradients=10, flops=30)
AGAIN = BlockBytes(kept=20, forward=110, backward=190, gradients=10, flops=40)
BATCH = Activations(
    before=50, plain=[PLAIN] * 4, again=[AGAIN] * 4, entering=20, head=200, head_kept=20,
    evaluation=150, flops=12,
)  # fmt: skip
STAYS = 1000 + 10 + 40 + 80 + 7


def by_phase(recompute: Recompute, **options: float) -> dict[str, int]:
    found = moments(STATIC, BATCH, recompute, context=7, **options)  # type: ignore[arg-type]
    for moment in found:
        assert moment.bytes == sum(moment.parts.values())
    return {moment.phase: moment.bytes for moment in found}


def test_nothing_recomputed() -> None:
    found = by_phase(Recompute())
    assert found == {
        "load": 1000 + 7 + 300,
        "forward": STAYS + 50 + 3 * 100 + 130,
        "loss": STAYS + 50 + 4 * 100 + 200,
        "backward": STAYS + 50 + 3 * 100 + 160,
        "optimizer": STAYS + 40 + 5,
        "evaluation": STAYS + 150,
    }


def test_the_first_layers_recomputed() -> None:
    found = by_phase(Recompute(3))
    assert found["loss"] == STAYS + 50 + 3 * 20 + 100 + 200
    # Either the last plain layer, or the last recomputed one with its later gradients.
    assert found["backward"] == max(STAYS + 50 + 3 * 20 + 160, STAYS + 50 + 2 * 20 + 190 + 10)


def test_all_recomputed_and_offloaded() -> None:
    assert by_phase(Recompute(4))["loss"] == STAYS + 50 + 4 * 20 + 200
    away = by_phase(Recompute(4, offload=True))
    # The first layer's input is the embeddings' output: on the host too, once the forward is done.
    assert away["loss"] == STAYS + 50 - 20 + 2 * 20 + 200
    assert away["forward"] == STAYS + 50 + 2 * 20 + 110
    assert away["backward"] == STAYS + 50 - 20 + 2 * 20 + 190 + 3 * 10


def test_libraries_and_holes_are_added_once() -> None:
    plain, more = by_phase(Recompute()), by_phase(Recompute(), workspace=9, holes=0.5)
    assert more["loss"] == plain["loss"] + 9 + (50 + 400) // 2
    assert more["optimizer"] == plain["optimizer"] + 9


def test_gradients_of_an_earlier_forward_wait() -> None:
    once, more = by_phase(Recompute()), by_phase(Recompute(), accumulates=True)
    assert more["forward"] == once["forward"] + 40
    assert more["loss"] == once["loss"] + 40
    # The last layer is the highest: none of its step's gradients are there yet, all earlier are.
    assert more["backward"] == once["backward"] + 40
    assert more["optimizer"] == once["optimizer"]


def test_an_audited_update_keeps_everything_for_each_term() -> None:
    block = replace(PLAIN, split=70)
    batch = replace(BATCH, plain=[block] * 4, held=30, split_head=90, beside=5)
    found = {
        (m.phase, waits): m.bytes
        for waits in (False, True)
        for m in moments(STATIC, batch, Recompute(), context=7, split=2, accumulates=waits)
    }
    kept = STAYS + 50 + 4 * 100
    # Two terms' gradients and what is left of the step's; all layers, and what the losses kept.
    assert found["audit", False] == kept + 3 * 40 + max(90, 30 + 70 - 10)
    assert found["audit", True] == found["audit", False] + 2 * 40
    assert found["loss", False] == kept + 200
    assert found["loss", True] == kept + 200 + 3 * 40 + 40
    assert found["backward", False] == STAYS + 50 + 3 * 100 + 160 + 3 * 40 + 5
    assert found["optimizer", False] == STAYS + 40 + 5 + 3 * 40
    assert found["evaluation", False] == STAYS + 150


def test_the_owner_is_the_largest_part() -> None:
    assert owner(peak(moments(STATIC, BATCH, Recompute(), context=7))) == "base"
    assert owner(peak(moments(STATIC, BATCH, Recompute(), context=5000))) == "context"


def test_operations_of_a_step() -> None:
    assert step_flops(BATCH, Recompute()) == 12 + 4 * 30
    assert step_flops(BATCH, Recompute(3)) == 12 + 3 * 40 + 30


def test_a_budget_takes_the_lighter_layers() -> None:
    light = BlockBytes(kept=70, forward=120, backward=150, gradients=10, flops=33, again=30)
    deep = BlockBytes(kept=20, forward=90, backward=170, gradients=10, flops=44, again=30)
    batch = replace(BATCH, light={0.7: ([light] * 4, [deep] * 4)})
    policy = Recompute(1, budget=0.7)
    found = {m.phase: m.bytes for m in moments(STATIC, batch, policy, context=7)}
    assert found["loss"] == STAYS + 50 + 20 + 3 * 70 + 200
    assert step_flops(batch, policy) == 12 + 44 + 3 * 33
    assert step_traffic(batch, policy) == 2 * 4 * 30
    assert step_traffic(batch, Recompute(1)) == 0


def cost(recompute: Recompute) -> tuple[int, float]:
    seconds = 10.0 + recompute.layers + (5 if recompute.offload else 0)
    return 100 - 10 * recompute.layers - (20 if recompute.offload else 0), seconds


def test_the_fastest_that_fits_is_chosen() -> None:
    options = ways(4, cost, offload=True)
    assert len(options) == 6
    for limit, layers, offload in ((100, 0, False), (79, 3, False), (60, 4, False), (45, 4, True)):
        chosen = fastest(options, limit)
        assert chosen is not None
        assert chosen.recompute == Recompute(layers, offload=offload)
        assert chosen.peak <= limit
    assert fastest(options, 39) is None


def test_a_budget_that_costs_less_than_layers_comes_first() -> None:
    def with_budget(recompute: Recompute) -> tuple[int, float]:
        size, seconds = cost(recompute)
        return size - round(30 * (1 - recompute.budget)), seconds + 1 - recompute.budget

    options = ways(4, with_budget, offload=True, budgets=(1.0, 0.5))
    assert len(options) == 12
    chosen = fastest(options, 85)
    assert chosen is not None
    assert chosen.recompute == Recompute(budget=0.5)
    assert policy_name(chosen.recompute, 4) == "light"
    assert "memory budget 0.5" in reason(chosen, options, 85, 4)
    mixed = fastest(options, 66)
    assert mixed is not None
    assert mixed.recompute == Recompute(2, budget=0.5)
    assert policy_name(mixed.recompute, 4) == "partial"
    assert "2 of 4 layers computed again, and what is cheap" in reason(mixed, options, 66, 4)


def test_the_reason_names_the_next_best() -> None:
    options = ways(4, cost, offload=False)
    chosen = fastest(options, 79)
    assert chosen is not None
    text = reason(chosen, options, 79, 4)
    assert "the first 3 of 4 layers" in text
    assert "the first 2 of 4 layers" in text
    assert "80 B" in text
    assert "8% faster" in text
    first = fastest(options, 1000)
    assert first is not None
    assert "all 4 layers computed again" in reason(first, options, 1000, 4)
    assert policy_name(Recompute(4, offload=True), 4) == "offload"


def test_several_devices() -> None:
    assert ddp(STATIC, 4).static == STATIC
    share = fsdp2(STATIC, 4, sharded=800, layer=100)
    assert share.static.base == STATIC.base - 800 + 200
    assert share.static.optimizer == STATIC.optimizer  # of adapters, which are on each device
    assert share.workspace == 200 + STATIC.gradients + NCCL_BYTES
