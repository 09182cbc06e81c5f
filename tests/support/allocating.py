"""What torch's CPU allocator really gives out."""

from __future__ import annotations

from collections.abc import Callable


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator gave out above those at the start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
