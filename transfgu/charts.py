"""A curve is one SVG path, so a chart needs no plotting library, no script and no network.

Colours are the page's own (CSS classes ``s0``, ``s1``, ...), so that a chart follows it into dark mode. Lines are told
apart by their dashes and by a name at their end, never by colour alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

_WIDTH, _HEIGHT = 440.0, 240.0  # user units; the page scales them
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 118.0, 14.0, 40.0
_MANY_MARKS = 24
_LINE_HEIGHT = 15.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: its name, and (x, y) points in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    x_range: tuple[float, float],
    unit: str = "",
    marks: Sequence[float] = (),
    from_zero: bool = False,
) -> Markup:
    """An SVG line chart.

    Args:
        title: what a screen reader says.
        series: at least one line with a point; a line of its own needs no name beside it.
        x_label: what x counts.
        x_range: the x axis's ends.
        unit: of y, written behind its values.
        marks: values of x that get a vertical line.
        from_zero: let the y axis begin at 0, whatever the values.
    """
    ys = [y for s in series for _, y in s.points]
    x_low, x_high = x_range if x_range[1] > x_range[0] else (x_range[0] - 1, x_range[0] + 1)
    x_ticks = [t for t in _ticks(x_low, x_high, 6) if t == round(t) and x_low <= t <= x_high]
    y_ticks = _ticks(0.0 if from_zero else min(ys), max(ys), 5)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def py(y: float) -> float:
        return round(_HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    parts = [head.format(_WIDTH, _HEIGHT, title)]
    for tick in y_ticks:
        parts.append(_rule("grid", _LEFT, right, py(tick), py(tick)))
        parts.append(_text("end", _LEFT - 6, py(tick) + 4, f"{tick:g}"))
    parts += [_text("middle", px(tick), floor + 16, f"{tick:g}") for tick in x_ticks]
    parts.append(_text("middle", (_LEFT + right) / 2, _HEIGHT - 6, x_label))
    top = _TOP if len(marks) <= _MANY_MARKS else floor - 10
    parts += [_rule("mark", px(mark), px(mark), top, floor) for mark in marks]
    for index, line in enumerate(series):
        path = " ".join(f"{'L' if i else 'M'}{px(x)} {py(y)}" for i, (x, y) in enumerate(line.points))
        parts.append(Markup('<path class="line s{}" d="{}"/>').format(index, path))
        if len(line.points) <= _MANY_MARKS:
            dot = Markup('<circle class="dot s{}" cx="{}" cy="{}" r="2.5"/>')
            parts += [dot.format(index, px(x), py(y)) for x, y in line.points]
    heights = _apart([py(s.points[-1][1]) for s in series])
    for index, (line, height) in enumerate(zip(series, heights, strict=True)):
        x, y = line.points[-1]
        name = f"{line.name} {_short(y)}{unit}" if len(series) > 1 else f"{_short(y)}{unit}"
        label = Markup('<text class="name s{}" x="{}" y="{}">{}</text>')
        parts.append(label.format(index, px(x) + 6, height + 4, name))
    return Markup("").join([*parts, Markup("</svg>")])


def _rule(kind: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, x1, x2, y1, y2)


def _text(anchor: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round values that span [low, high], `count` or a few more of them; at least two."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = sorted((0.0, 2 * high or 1.0))
    rough = (high - low) / count
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _apart(heights: Sequence[float]) -> list[float]:
    """The same heights, moved down where two names would overlap."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=lambda i: moved[i])
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + _LINE_HEIGHT)
    return moved


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
