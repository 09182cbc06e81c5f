"""Weights whose storage is freed and filled again for each call, as FSDP2 does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER
from speeding import furthest, gradients, tiny

from glasstune.fast.compile import entry_of
from glasstune.fast.speed_up import plain, speed_up

pytestmark = QUIET_COMPILER


def refill(weight: torch.Tensor, generator: torch.Generator) -> None:
    """Frees a storage and fills it with other bytes, at another address."""
    storage = weight.untyped_storage()
    size, before = storage.size(), storage.data_ptr()
    held: list[torch.Tensor] = []  # what is freed is given out again: take it away first
    while storage.data_ptr() == before and len(held) < 1000:
        storage.resize_(0)
        held.append(torch.empty(size, dtype=torch.uint8))
        storage.resize_(size)
    assert storage.data_ptr() != before
    del held
    bytes_ = torch.randint(1, 255, (size,), dtype=torch.uint8, generator=generator)
    torch.empty(0, dtype=torch.uint8).set_(storage).copy_(bytes_)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_refilled_storage_is_read_as_it_is(bits: int) -> None:
    model: Any = tiny("llama", bits)
    report = speed_up(model, compile=False)
    gradients(model)
    sources = [group.source for group in report.groups]
    assert all(source is not None for source in sources)
    before = gradients(model)
    generator = torch.Generator().manual_seed(3)
    for group in report.groups:
        for base in group.bases:
            refill(base.weight, generator)
    after = gradients(model)
    # Opened once: opening reads code tables, for which a GPU would be waited for in each call.
    assert all(group.source is source for group, source in zip(report.groups, sources, strict=True))
    assert furthest(after, before) > 0.1
    with plain(model):
        assert furthest(after, gradients(model)) < 2e-5


def test_an_entry_stands_where_the_hooks_of_a_call_stay_outside() -> None:
    """FSDP2's class is told by its name: its hooks run around `forward`, the graph inside them."""

    class FSDPModule:
        """What `fully_shard` mixes in."""

    model: Any = tiny("llama")
    block = model.base_model.model.model.layers[0]
    block.__class__ = type("FSDPBlock", (FSDPModule, type(block)), {})
    seen: list[bool] = []
    block.register_forward_pre_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    truth = gradients(model)
    report = speed_up(model, compile=True, compile_options={"backend": "aot_eager"})
    entry = entry_of(block)
    assert entry is not None
    assert entry.sharded
    assert block._compiled_call_impl is None
    seen.clear()
    assert furthest(gradients(model), truth) < 2e-5
    assert seen == [False]
    with report.plain():
        assert entry_of(block) is None
        assert "forward" not in block.__dict__
    assert entry_of(block) is entry
    report.undo()
    assert entry_of(block) is None
    assert "forward" not in block.__dict__
