"""The lengths of rows as a plain SVG histogram, readable in both colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 44, 38


def histogram(bins: Sequence[Sequence[int]], marks: Mapping[str, int]) -> Markup:
    """Draws how many rows have how many tokens.

    Args:
        bins: `[first, last, rows]` of each bin, in tokens, without gaps between them.
        marks: Name of a length to the length; drawn as lines with their names.

    Returns:
        An `svg` element, or nothing where there is no row.
    """
    most = max((rows for _, _, rows in bins), default=0)
    if not most:
        return Markup("")
    first, last = bins[0][0], bins[-1][1] + 1
    width = (WIDTH - _LEFT - _RIGHT) / (last - first)

    def x(length: float) -> float:
        return _LEFT + (length - first) * width

    def y(rows: float) -> float:
        return HEIGHT - _BOTTOM - rows / most * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for rows in sorted({0, most // 2, most}):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" y1="{y(rows):.1f}" x2="{WIDTH - _RIGHT}" '
            f'y2="{y(rows):.1f}"></line><text class="tick end" x="{_LEFT - 7}" '
            f'y="{y(rows) + 4:.1f}">{rows:,}</text>'
        )
    for low, high, rows in bins:
        if rows:
            top = min(y(rows), y(0) - 1.5)  # one row in a million is seen, too
            parts.append(
                f'<rect class="bin" x="{x(low):.1f}" y="{top:.1f}" '
                f'width="{max(1.0, (high + 1 - low) * width - 1):.1f}" height="{y(0) - top:.1f}">'
                f"<title>{low:,} to {high:,} tokens: {rows:,} rows</title></rect>"
            )
    for value in _ticks(first, last):
        parts.append(
            f'<text class="tick middle" x="{x(value):.1f}" y="{HEIGHT - 20}">{value:,}</text>'
        )
    parts += _marks(marks, x)
    parts.append(
        f'<text class="tick middle" x="{(WIDTH + _LEFT - _RIGHT) / 2:.0f}" y="{HEIGHT - 4}">'
        f'tokens of a row</text><text class="tick end" x="{_LEFT - 7}" y="12">rows</text>'
    )
    words = ", ".join(f"{name} {value:,}" for name, value in marks.items())
    label = escape(f"Rows by length in tokens: {words}")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _ticks(first: int, last: int) -> list[int]:
    """About six round numbers."""
    step = 1
    for step in (scale * unit for scale in (10**k for k in range(9)) for unit in (1, 2, 5)):
        if (last - first) / step <= 7:
            break
    return list(range(-(-first // step) * step, last + 1, step))


def _marks(marks: Mapping[str, int], x: Callable[[float], float]) -> list[str]:
    """A line for each named length; a name moves down where it would cover the one before."""
    parts: list[str] = []
    before, height = -1000.0, 12
    for name, value in sorted(marks.items(), key=lambda item: item[1]):
        at = x(value)
        height = height + 13 if at - before < 110 and height < 38 else 12
        before = at
        late = at > WIDTH - 130
        parts.append(
            f'<line class="mark" x1="{at:.1f}" y1="{height - 9}" x2="{at:.1f}" '
            f'y2="{HEIGHT - _BOTTOM}"></line>'
            f'<text class="name{" end" if late else ""}" x="{at + (-5 if late else 5):.1f}" '
            f'y="{height}">{escape(name)} {value:,}</text>'
        )
    return parts
