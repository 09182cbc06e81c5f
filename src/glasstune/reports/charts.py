"""Line charts as plain SVG: axes, direct labels, dashes; readable without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 760, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 178, 28, 40
_STYLES = 6
_APART = 15
"""Pixels between two names."""
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
        y: Name of the vertical axis; `share` is written in percent.
        log: Logarithmic vertical axis; values that are not above zero are left out.

    Returns:
        An `svg` element, or nothing where there is nothing to draw.
    """
    drawn = [Line(line.name, _thin(_usable(line.points, log))) for line in lines]
    values = [(at, value) for line in drawn for at, value in line.points if value is not None]
    if not values:
        return Markup("")
    scale = _Scale(values, log, percent=y == "share")
    parts = [*scale.grid(), *scale.names(x, y)]
    ends: list[tuple[float, float, int, str]] = []
    for index, line in enumerate(drawn):
        parts += _strokes(line, scale, f"line s{index % _STYLES}")
        last = next(((a, v) for a, v in reversed(line.points) if v is not None), None)
        if last is not None:
            ends.append((scale.y(last[1]), scale.x(last[0]), index, line.name))
    parts += _labels(ends)
    inside = "".join(parts)
    label = escape(f"{title}; the numbers are in the table below")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{inside}</svg>"
    )


def _strokes(line: Line, scale: _Scale, style: str) -> list[str]:
    """The line in pieces between its gaps; a point alone is a dot."""
    parts = []
    for piece in _pieces(line.points):
        places = [(scale.x(at), scale.y(value)) for at, value in piece]
        if len(places) == 1:
            across, height = places[0]
            parts.append(
                f'<circle class="{style}" cx="{across:.1f}" cy="{height:.1f}" r="2.5"></circle>'
            )
        else:
            path = " ".join(f"{across:.1f},{height:.1f}" for across, height in places)
            parts.append(f'<polyline class="{style}" points="{path}"></polyline>')
    return parts


def _labels(ends: Sequence[tuple[float, float, int, str]]) -> list[str]:
    """Names to the right, each as near to its line's end as the others leave room."""
    ordered = sorted(ends)
    heights = [height for height, _, _, _ in ordered]
    for at in range(1, len(heights)):
        heights[at] = max(heights[at], heights[at - 1] + _APART)
    floor = HEIGHT - _BOTTOM + 10.0
    for at in range(len(heights) - 1, -1, -1):
        heights[at] = min(heights[at], floor)
        floor = heights[at] - _APART
    left = WIDTH - _RIGHT + 22
    parts = []
    for (end, start, index, name), height in zip(ordered, heights, strict=True):
        style = f"s{index % _STYLES}"
        parts.append(
            f'<line class="lead" x1="{start + 2:.1f}" y1="{end:.1f}" x2="{left - 4}" '
            f'y2="{height:.1f}"></line>'
            f'<line class="line {style}" x1="{left}" y1="{height:.1f}" x2="{left + 22}" '
            f'y2="{height:.1f}"></line>'
            f'<text class="name" x="{left + 27}" y="{height + 4:.1f}">{escape(_fit(name))}</text>'
        )
    return parts


def _fit(name: str) -> str:
    return name if len(name) <= 19 else f"{name[:18]}\u2026"


class _Scale:
    """From values to places."""

    def __init__(self, values: Sequence[tuple[float, float]], log: bool, percent: bool) -> None:
        self.log, self.percent = log, percent
        heights = [self._height(value) for _, value in values]
        low, high = min(heights), max(heights)
        pad = 0.05 * (high - low) or (0.3 if log else abs(high) * 0.1 or 1.0)
        self.low, self.high = low - pad, high + pad
        self.left, self.right = min(at for at, _ in values), max(at for at, _ in values)
        if self.right == self.left:
            self.right += 1

    def _height(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def x(self, at: float) -> float:
        share = (at - self.left) / (self.right - self.left)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (self._height(value) - self.low) / (self.high - self.low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> list[str]:
        """Lines across with their values, and values below."""
        parts = []
        for value in self._levels():
            at = self.y(value)
            style = "grid zero" if value == 0 else "grid"
            parts.append(
                f'<line class="{style}" x1="{_LEFT}" y1="{at:.1f}" x2="{WIDTH - _RIGHT}" '
                f'y2="{at:.1f}"></line>'
                f'<text class="tick end" x="{_LEFT - 7}" y="{at + 4:.1f}">'
                f"{self._text(value)}</text>"
            )
        step = max(1, round_step((self.right - self.left) / 6))  # updates are whole numbers
        value = math.ceil(self.left / step) * step
        while value <= self.right:
            parts.append(
                f'<text class="tick middle" x="{self.x(value):.1f}" y="{HEIGHT - 22}">'
                f"{value:,.0f}</text>"
            )
            value += step
        return parts

    def _levels(self) -> list[float]:
        """Round values inside the axis: powers of ten, or steps of 1, 2 or 5."""
        if self.log:
            for units in ((1,), (1, 3), (1, 2, 5)):
                found = [
                    unit * 10.0**power
                    for power in range(math.floor(self.low), math.ceil(self.high) + 1)
                    for unit in units
                    if self.low <= math.log10(unit) + power <= self.high
                ]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / 7)]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        step = round_step((high - low) / 8)
        first = math.ceil(low / step)
        return [round(at * step, 12) for at in range(first, math.floor(high / step) + 1)]

    def _text(self, value: float) -> str:
        return f"{value:.4g}" if not self.percent else f"{value * 100:.4g}%".replace("-", "\u2212")

    def names(self, x: str, y: str) -> list[str]:
        """What the axes are."""
        middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
        scale = f"{y} (logarithmic)" if self.log else y
        return [
            f'<text class="tick middle" x="{middle:.0f}" y="{HEIGHT - 5}">{escape(x)}</text>',
            f'<text class="tick" x="4" y="13">{escape(scale)}</text>',
        ]


def round_step(step: float) -> float:
    """Returns the next of 1, 2, 5 times a power of ten that is not below a step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(unit * power for unit in (1, 2, 5, 10) if unit * power >= step * (1 - 1e-9))


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
