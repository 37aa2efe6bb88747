"""Draw charts as SVG, without a plotting library, scripts or network access.

Charts use the CSS classes of the page (``s0``, ``s1``, ...) for colours, so they follow it into dark mode. Lines differ
in their dashes and have names at their ends, so colour is never the only difference.
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

# To type checkers an int is a float; to the run-time checks of the tests it is not.
Real = float | int


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
    chosen: float | None = None,
    from_zero: bool = False,
) -> Markup:
    """Return an SVG line chart.

    Args:
        title: text for screen readers.
        series: at least one line with a point; if there is only one line, its name is not drawn.
        x_label: name of the x axis.
        x_range: ends of the x axis.
        unit: of y, written after its values.
        marks: values of x with a dotted vertical line.
        chosen: a value of x with a solid vertical line.
        from_zero: start the y axis at 0, whatever the values.
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
    parts = [_open(title)]
    for tick in y_ticks:
        parts.append(_rule("grid", _LEFT, right, py(tick), py(tick)))
        parts.append(_text("end", _LEFT - 6, py(tick) + 4, f"{tick:g}"))
    parts += [_text("middle", px(tick), floor + 16, f"{tick:g}") for tick in x_ticks]
    parts.append(_text("middle", (_LEFT + right) / 2, _HEIGHT - 6, x_label))
    top = _TOP if len(marks) <= _MANY_MARKS else floor - 10
    parts += [_rule("mark", px(mark), px(mark), top, floor) for mark in marks]
    if chosen is not None:
        parts.append(_rule("chosen", px(chosen), px(chosen), _TOP, floor))
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


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis: the name of its quantity, its ends, whether it is logarithmic, whether its values are whole numbers."""

    name: str
    low: Real
    high: Real
    log: bool = False
    whole: bool = False

    def place(self, value: Real) -> float:
        """Return the position of a value on the axis, from 0 at `low` to 1 at `high`."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return 0.5 if high == low else (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return the values to write along the axis: round values within its ends, or powers of ten."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            powers = [10.0**e for e in range(first, last + 1)]
            return powers if len(powers) > 1 else [float(self.low), float(self.high)]
        if self.high == self.low:
            return [float(self.low)]
        inside = [t for t in _ticks(float(self.low), float(self.high), 4) if self.low - 1e-9 <= t <= self.high + 1e-9]
        return [t for t in inside if t == round(t)] if self.whole else inside


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One trial in a chart: its coordinates, its kind (`best`, `finished` or `stopped`), and its name."""

    points: Sequence[tuple[Real, Real]]
    kind: str
    name: str


def curves_chart(title: str, marks: Sequence[Mark], *, x: Axis, y: Axis) -> Markup:
    """Return an SVG chart of curves: the best one is thick and named, stopped ones are dashed and end in a cross."""
    return _marks_chart(title, marks, x, y, lines=True)


def scatter_chart(title: str, marks: Sequence[Mark], *, x: Axis, y: Axis) -> Markup:
    """Return an SVG chart of points: the best is filled and named, finished ones are rings, stopped ones crosses."""
    return _marks_chart(title, marks, x, y, lines=False)


def _marks_chart(title: str, marks: Sequence[Mark], x: Axis, y: Axis, *, lines: bool) -> Markup:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - 0.6 * _RIGHT

    def px(value: Real) -> float:
        return round(_LEFT + x.place(value) * (right - _LEFT), 1)

    def py(value: Real) -> float:
        return round(floor - y.place(value) * (floor - _TOP), 1)

    parts = [_open(title)]
    for tick in y.ticks():
        parts.append(_rule("grid", _LEFT, right, py(tick), py(tick)))
        parts.append(_text("end", _LEFT - 6, py(tick) + 4, f"{tick:g}"))
    parts += [_text("middle", px(tick), floor + 16, f"{tick:g}") for tick in x.ticks()]
    parts.append(_text("middle", (_LEFT + right) / 2, _HEIGHT - 6, x.name))
    for mark in sorted(marks, key=lambda mark: mark.kind == "best"):  # on top of the others
        places = [(px(a), py(b)) for a, b in mark.points]
        if lines:
            parts.append(_path(mark.kind, places))
        parts.append(_end(mark.kind, *places[-1]))
        if mark.kind == "best":
            parts.append(_name(*places[-1], mark.name))
    return Markup("").join([*parts, Markup("</svg>")])


def parallel_chart(title: str, axes: Sequence[Axis], marks: Sequence[Mark]) -> Markup:
    """Return an SVG chart of parallel coordinates, with one line per trial.

    Args:
        title: text for screen readers.
        axes: from left to right.
        marks: x of the i-th point is i, y is the value on the i-th axis.
    """
    width, floor = _WIDTH * 1.6, _HEIGHT - _BOTTOM
    step = (width - 2 * _RIGHT) / max(1, len(axes) - 1)

    def place(index: Real, value: Real) -> tuple[float, float]:
        axis = axes[int(index)]
        return round(_RIGHT + index * step, 1), round(floor - axis.place(value) * (floor - _TOP), 1)

    parts = [_open(title, width)]
    for mark in sorted(marks, key=lambda mark: mark.kind == "best"):
        parts.append(_path(mark.kind, [place(i, value) for i, value in mark.points]))
    for index, axis in enumerate(axes):
        x = _RIGHT + index * step
        parts.append(_rule("axis", x, x, _TOP, floor))
        parts += [_text("end", x - 5, place(index, tick)[1] + 4, f"{tick:g}") for tick in axis.ticks()]
        parts.append(_text("middle", x, _HEIGHT - 16, axis.name))
    return Markup("").join([*parts, Markup("</svg>")])


def _open(title: str, width: float = _WIDTH) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return head.format(width, _HEIGHT, title)


def _path(kind: str, places: Sequence[tuple[float, float]]) -> Markup:
    path = " ".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate(places))
    return Markup('<path class="line {}" d="{}"/>').format(kind, path)


def _end(kind: str, x: float, y: float) -> Markup:
    if kind == "stopped":
        path = f"M{x - 3:g} {y - 3:g}l6 6M{x - 3:g} {y + 3:g}l6 -6"
        return Markup('<path class="cross" d="{}"/>').format(path)
    radius = 4.5 if kind == "best" else 3
    return Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"/>').format(kind, x, y, radius)


def _name(x: float, y: float, name: str) -> Markup:
    return Markup('<text class="name best" x="{}" y="{}">{}</text>').format(x + 8, y + 4, name)


def _rule(kind: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, x1, x2, y1, y2)


def _text(anchor: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return round values that span [low, high]: `count` or a few more of them, at least two."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = sorted((0.0, 2 * high or 1.0))
    rough = (high - low) / count
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _apart(heights: Sequence[float]) -> list[float]:
    """Return the same heights, moved down where two names would overlap."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=lambda i: moved[i])
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + _LINE_HEIGHT)
    return moved


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
