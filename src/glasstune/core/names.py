"""One way to refuse a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from glasstune.core.errors import InputError


def check_names(
    names: Iterable[str], known: Iterable[str], *, code: str, owner: str, where: str
) -> None:
    """Refuses the first name that is not known, naming the nearest one that is.

    Args:
        names: What the user wrote.
        known: What exists.
        code: Code of the error.
        owner: What has these names, for the message: `LoraConfig`.
        where: The config key above the name; the name itself is appended.

    Raises:
        InputError: A name is not known.
    """
    existing = list(known)
    for name in names:
        if name not in existing:
            near = difflib.get_close_matches(name, existing, n=1)
            raise InputError(
                code,
                f"{owner} has no option {name!r}",
                where=f"{where}.{name}",
                fix=f"did you mean {near[0]}?" if near else f"known: {', '.join(existing)}",
            )
