"""How long to fuzz: `./run test-full` sets GLASSTUNE_FUZZ to multiply every number of examples."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    """Examples of a hypothesis test, scaled."""
    return count * int(os.environ.get("GLASSTUNE_FUZZ", "1"))
