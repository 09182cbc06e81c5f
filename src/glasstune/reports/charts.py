"""Line charts as plain SVG: axes, direct labels, dashes; readable without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 26, 34
_MOST = 600
"""Points of a line; more than a screen has pixels would only make the page large."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Args:
        name: Stands at its end.
        points: (x, y); y is None where there is no value, and the line is broken there.
    """

    name: str
    points: Sequence[tuple[float, float | None]]


def line_chart(lines: Sequence[Line], *, title: str, x: str, y: str, log: bool = False) -> Markup:
    """Draws lines over one pair of axes.

    Args:
        lines: At most six are told apart by dashes.
        title: Read to those who cannot see it.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        log: Logarithmic vertical axis; values that are not above zero are left out.

    Returns:
        An `svg` element, or nothing where there is nothing to draw.
    """
    drawn = [Line(line.name, _thin(_usable(line.points, log))) for line in lines]
    values = [(at, value) for line in drawn for at, value in line.points if value is not None]
    if not values:
        return Markup("")
    scale = _Scale(values, log)
    parts = [*scale.grid(), *scale.names(x, y)]
    ends: list[float] = []
    for index, line in enumerate(drawn):
        for piece in _pieces(line.points):
            path = " ".join(f"{scale.x(at):.1f},{scale.y(value):.1f}" for at, value in piece)
            if len(piece) == 1:
                at, value = piece[0]
                parts.append(
                    f'<circle class="line s{index % 6}" cx="{scale.x(at):.1f}" '
                    f'cy="{scale.y(value):.1f}" r="2.5"></circle>'
                )
            else:
                parts.append(f'<polyline class="line s{index % 6}" points="{path}"></polyline>')
        last = next((v for _, v in reversed(line.points) if v is not None), None)
        if last is not None:
            parts.append(_label(line.name, scale.y(last), index, ends))
    inside = "".join(parts)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{inside}</svg>'
    )


def _label(name: str, height: float, index: int, taken: list[float]) -> str:
    """A name at the end of its line, moved down where another stands."""
    while any(abs(height - other) < 14 for other in taken):
        height += 4
    taken.append(height)
    at = WIDTH - _RIGHT + 6
    return (
        f'<line class="line s{index % 6}" x1="{at}" y1="{height:.1f}" x2="{at + 18}" '
        f'y2="{height:.1f}"></line>'
        f'<text class="name" x="{at + 23}" y="{height + 4:.1f}">{escape(_short(name))}</text>'
    )


def _short(name: str) -> str:
    return name if len(name) <= 17 else f"{name[:16]}…"


class _Scale:
    """From values to places."""

    def __init__(self, values: Sequence[tuple[float, float]], log: bool) -> None:
        self.log = log
        heights = [self._height(value) for _, value in values]
        self.low, self.high = min(heights), max(heights)
        if self.high - self.low < 1e-12:
            pad = abs(self.high) * 0.1 or 1.0
            self.low, self.high = self.low - pad, self.high + pad
        self.left, self.right = min(at for at, _ in values), max(at for at, _ in values)
        if self.right == self.left:
            self.right += 1

    def _height(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def x(self, at: float) -> float:
        share = (at - self.left) / (self.right - self.left)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self._at(self._height(value))

    def _at(self, height: float) -> float:
        share = (height - self.low) / (self.high - self.low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> list[str]:
        """Lines across with their values, and values below."""
        parts = []
        right = WIDTH - _RIGHT
        for step in range(5):
            height = self.low + (self.high - self.low) * step / 4
            at = self._at(height)
            shown = 10**height if self.log else height
            parts.append(
                f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"></line>'
                f'<text class="tick end" x="{_LEFT - 7}" y="{at + 4:.1f}">{_number(shown)}</text>'
            )
        places = {self.left + (self.right - self.left) * step / 4 for step in range(5)}
        for value in sorted({round(place) for place in places}):  # updates are whole numbers
            parts.append(
                f'<text class="tick middle" x="{self.x(value):.1f}" y="{HEIGHT - 18}">'
                f"{value:,.0f}</text>"
            )
        return parts

    def names(self, x: str, y: str) -> list[str]:
        """What the axes are."""
        middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
        scale = f"{y} (logarithmic)" if self.log else y
        return [
            f'<text class="tick middle" x="{middle:.0f}" y="{HEIGHT - 3}">{escape(x)}</text>',
            f'<text class="tick" x="{_LEFT}" y="12">{escape(scale)}</text>',
        ]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _usable(
    points: Sequence[tuple[float, float | None]], log: bool
) -> list[tuple[float, float | None]]:
    """Values that have no place become gaps."""
    found: list[tuple[float, float | None]] = []
    for at, value in points:
        fits = value is not None and math.isfinite(value) and (value > 0 or not log)
        found.append((at, value if fits else None))
    return found


def _thin(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Every nth point, the last one always."""
    every = max(1, math.ceil(len(points) / _MOST))
    thin = points[::every]
    if points and thin[-1] != points[-1]:
        thin.append(points[-1])
    return thin


def _pieces(
    points: Sequence[tuple[float, float | None]],
) -> list[list[tuple[float, float]]]:
    """The line between its gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for at, value in points:
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((at, value))
    return [piece for piece in pieces if piece]
