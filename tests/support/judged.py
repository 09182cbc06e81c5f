"""How a kernel is judged: by its distance to an exact truth, at most twice eager's own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def too_far(
    ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> dict[str, str]:
    """Returns what is further from the truth than twice eager's distance, and by how much.

    Distances are relative in the Frobenius norm; 1e-6 of the truth's norm is always allowed.
    """
    assert ours.keys() == eager.keys() == truth.keys()
    found = {}
    for name, right in truth.items():
        right = right.double()
        mine = float((ours[name].double() - right).norm())
        theirs = float((eager[name].double() - right).norm())
        if not mine <= 2 * theirs + 1e-6 * float(right.norm()):  # NaN counts as far
            found[name] = f"{mine:.3g} against {theirs:.3g} of {float(right.norm()):.3g}"
    return found
