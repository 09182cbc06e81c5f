"""Which process of a run this is, by what torchrun put into the environment. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glasstune.core.errors import InputError

LOG_RANKS = "GLASSTUNE_LOG_RANKS"
"""Ranks that write a log beside rank 0: `all`, or numbers such as `1,3`."""
EXIT_FILE = "GLASSTUNE_EXIT_FILE"
"""Where rank 0 leaves its exit code for `glasstune train --nproc`, which started it."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a run.

    Args:
        index: 0 is the one that writes.
        count: Processes of the run.
        local: Its number on its machine; also the number of its GPU.
        local_count: Processes on its machine.
        node: Number of its machine.
        restart: How often torchrun has started this run again.
        address: Where the processes meet.
        port: Of that.
        agent: Whether torchrun keeps the meeting place; else rank 0 does.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1
    node: int = 0
    restart: int = 0
    address: str = ""
    port: int = 0
    agent: bool = False

    @property
    def logs(self) -> bool:
        """Whether it writes a log."""
        asked = os.environ.get(LOG_RANKS, "")
        named = {word.strip() for word in asked.split(",")}
        return self.index == 0 or asked == "all" or str(self.index) in named


def this_rank(given: Mapping[str, str] | None = None) -> Rank:
    """Reads the environment.

    Args:
        given: Instead of the process's own.

    Raises:
        InputError: `rank_environment`: a variable is missing or no number.
    """
    values = os.environ if given is None else given
    count = _number(values, "WORLD_SIZE", 1)
    if count <= 1:
        return Rank(restart=_number(values, "TORCHELASTIC_RESTART_COUNT", 0))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not values.get(name)]
    index = _number(values, "RANK", 0)
    if missing or not 0 <= index < count:
        says = f"{', '.join(missing)} not set" if missing else f"RANK is {index}"
        raise InputError(
            "rank_environment",
            f"WORLD_SIZE is {count}, but {says}",
            where="environment",
            fix="start all processes with torchrun, or unset WORLD_SIZE to train with one",
        )
    return Rank(
        index=index,
        count=count,
        local=_number(values, "LOCAL_RANK", 0),
        local_count=_number(values, "LOCAL_WORLD_SIZE", 1),
        node=_number(values, "GROUP_RANK", 0),
        restart=_number(values, "TORCHELASTIC_RESTART_COUNT", 0),
        address=values["MASTER_ADDR"],
        port=_number(values, "MASTER_PORT", 0),
        agent=values.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _number(values: Mapping[str, str], name: str, default: int) -> int:
    text = values.get(name, "") or str(default)
    try:
        return int(text)
    except ValueError:
        raise InputError(
            "rank_environment",
            f"{name} is {text!r}, no number",
            where="environment",
            fix="start with torchrun, or unset it",
        ) from None


def leave_exit_code(code: int) -> None:
    """Tells the launcher how rank 0 ended."""
    place = os.environ.get(EXIT_FILE)
    if place and os.environ.get("RANK") == "0":
        try:
            Path(place).write_text(str(code), encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"warning: {place}: {error.strerror}\n")
