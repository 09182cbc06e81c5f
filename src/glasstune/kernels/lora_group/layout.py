"""The shape of a group: which rows and columns of the wide weight belong to which member."""

from __future__ import annotations

from dataclasses import dataclass

MAX_MEMBERS = 4
"""dynamo takes a fixed number of tensors into an autograd function, not a list of them."""

_ALIGN = 8
"""Columns are added in this step, so that each row of a 16-bit M starts at 16 bytes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A group of linear layers with one input.

    The wide weight is `M = [[W, s·B], [A, 0]]`, [n + k, i + k]: the rows of W by member, then the
    rows of all A; the columns of the input, then k columns in which each member's rows hold its
    s·B and zero elsewhere. Rows and columns that k has beyond the ranks are zero. The corner
    below s·B is never read and holds anything.

    Args:
        width: Input features, i.
        outs: Output features of each member; their sum is n.
        ranks: Rank of each member; empty where only W is expanded.
        scales: LoRA scale s of each member.
    """

    width: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def rows(self) -> int:
        """Output features of all members, n."""
        return sum(self.outs)

    @property
    def columns(self) -> int:
        """The sum of the ranks, rounded up: k."""
        return -(-sum(self.ranks) // _ALIGN) * _ALIGN

    @property
    def apart(self) -> bool:
        """Whether outputs are so much wider than the input that each has a product of its own.

        Then nothing joins their gradients, and the backward takes A and s·B on the input's side.
        """
        return min(self.outs) >= 2 * self.width

    @property
    def narrows(self) -> bool:
        """Whether the input is so much wider than the output that A joins on the output's side."""
        return self.width >= 2 * self.rows

    def out_slices(self) -> list[slice]:
        """Returns the rows of each member in M."""
        return _slices(self.outs)

    def rank_slices(self) -> list[slice]:
        """Returns each member's columns, counted from i, and rows of A, counted from n."""
        return _slices(self.ranks)

    def without_adapters(self) -> Layout:
        """Returns the layout of W alone: k is 0."""
        return Layout(self.width, self.outs, (), ())


def _slices(sizes: tuple[int, ...]) -> list[slice]:
    found, start = [], 0
    for size in sizes:
        found.append(slice(start, start + size))
        start += size
    return found
