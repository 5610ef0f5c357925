"""Line charts and bars as inline SVG, coloured by the page's style sheet so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from nemo_pre.report.markup import text

WIDTH, HEIGHT = 380, 232  # about the size at which a page shows it, so that its text keeps the page's size
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 34  # LEFT at least: long labels of the y axis make room for themselves
CHARACTER, GAP = 7.7, 6  # of a label at 12 px in a wide font; from a label to what it names
MOST_POINTS = 400  # of one line
DASHES = 4  # dashes in the style sheet: a line is told apart without its colour

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """``points`` in order of x, a gap where y is nan; ``faint`` lies thin behind them, in the same colour."""

    label: str
    points: Points
    faint: Points = ()


def line_chart(title: str, lines: Sequence[Line], x_label: str, zero: bool = False, y_range: Points = ()) -> str:
    """A figure with its title and, for several lines, a legend.

    ``zero``: the y axis starts at 0. ``y_range``: ``[(low, high)]`` fixes it.
    """
    frame = _Frame.around(lines, zero, y_range)
    drawn = "".join(_line(frame, number, line) for number, line in enumerate(lines))
    legend = ""
    if len(lines) > 1:
        entries = (
            f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="{_style(number)}" d="M0 4H24"/>'
            f"</svg>{text(line.label)}</li>"
            for number, line in enumerate(lines)
        )
        legend = f'<ul class="legend">{"".join(entries)}</ul>'
    return (
        f'<figure class="chart"><figcaption>{text(title)}</figcaption>{legend}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(_described(title, lines))}">'
        f"{_axes(frame, x_label)}{drawn}</svg></figure>"
    )


def share_bar(share: float, low: float | None, high: float | None, label: str) -> str:
    """A bar from 0 to ``share`` of its width, with a whisker from ``low`` to ``high``."""
    whisker = ""
    if low is not None and high is not None:
        whisker = (
            f'<path class="whisker" d="M{_n(100 * low)} 7H{_n(100 * high)}M{_n(100 * low)} 4v6M{_n(100 * high)} 4v6"/>'
        )
    return (
        f'<svg class="bar" viewBox="0 0 100 14" preserveAspectRatio="none" role="img" aria-label="{text(label)}">'
        f'<rect class="track" width="100" height="14"/><rect class="fill" width="{_n(100 * share)}" height="14"/>'
        f"{whisker}</svg>"
    )


@dataclass(frozen=True)
class _Frame:
    """The values at the edges of the plotting area, and where it begins."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @cached_property
    def rows(self) -> list[tuple[float, str]]:
        """Ticks of the y axis with their labels."""
        ticks = _ticks(self.y_low, self.y_high)
        return list(zip(ticks, _tick_labels(ticks), strict=True))

    @cached_property
    def left(self) -> float:
        return max(LEFT, GAP + math.ceil(CHARACTER * max((len(label) for _, label in self.rows), default=0)))

    @classmethod
    def around(cls, lines: Sequence[Line], zero: bool, y_range: Points) -> _Frame:
        points = [point for line in lines for point in [*line.points, *line.faint]]
        x = [0.0, *(x for x, _ in points)]
        if y_range:
            return cls(min(x), max(x), *y_range[0])
        y = [y for _, y in points if math.isfinite(y)] or [0.0]
        low, high = (min(0.0, *y), max(y)) if zero else (min(y), max(y))
        margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(min(x), max(x), low if zero and low == 0 else low - margin, high + margin)

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1)
        return self.left + share * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - BOTTOM - TOP)


def _axes(frame: _Frame, x_label: str) -> str:
    parts = []
    left, columns = frame.left, _ticks(frame.x_low, frame.x_high)
    for tick, label in frame.rows:
        y = _n(frame.y(tick))
        parts.append(f'<path class="grid" d="M{_n(left)} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{_n(left - GAP)}" y="{y}" dy="0.35em" text-anchor="end">{label}</text>')
    for tick, label in zip(columns, _tick_labels(columns), strict=True):
        x, bottom = frame.x(tick), HEIGHT - BOTTOM
        anchor = "end" if x + CHARACTER * len(label) / 2 > WIDTH else "middle"
        parts.append(f'<path class="axis" d="M{_n(x)} {bottom}v4"/>')
        parts.append(f'<text x="{_n(x)}" y="{bottom + 15}" text-anchor="{anchor}">{label}</text>')
    parts.append(f'<path class="axis" d="M{_n(left)} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (left + WIDTH - RIGHT) / 2
    return "".join(parts) + f'<text x="{_n(middle)}" y="{HEIGHT - 4}" text-anchor="middle">{text(x_label)}</text>'


def _line(frame: _Frame, number: int, line: Line) -> str:
    faint = f'<path class="{_style(number)} faint" d="{_path(frame, line.faint)}"/>' if line.faint else ""
    alone = [point for point in line.points if math.isfinite(point[1])] if len(line.points) < 12 else []
    marks = "".join(
        f'<circle class="{_style(number)}" cx="{_n(frame.x(x))}" cy="{_n(frame.y(y))}" r="3"/>' for x, y in alone
    )
    return f'{faint}<path class="{_style(number)}" d="{_path(frame, line.points)}"/>{marks}'


def _path(frame: _Frame, points: Points) -> str:
    """Moves and lines; the pen is lifted over nan."""
    steps, down = [], False
    for x, y in _thinned(points):
        if math.isfinite(y):
            steps.append(f"{'L' if down else 'M'}{_n(frame.x(x))} {_n(frame.y(y))}")
        down = math.isfinite(y)
    return "".join(steps)


def _thinned(points: Points) -> Points:
    """No more than ``MOST_POINTS`` points: of neighbours the lowest and the highest, so that spikes remain, and gaps
    as gaps."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        gaps = [point for point in bucket if not math.isfinite(point[1])][:1]
        finite = [point for point in bucket if math.isfinite(point[1])]
        ends = [min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])] if finite else []
        kept += sorted({*ends, *gaps})
    return kept


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    slack = 1e-9 * (high - low)
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low - slack <= tick <= high + slack]


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """All in one notation, and short: 0.5, 20k, 1.5e-4."""
    largest = max(map(abs, ticks), default=0.0)
    if largest >= 10_000:
        return [f"{tick / 1000:g}k" if tick else "0" for tick in ticks]
    if largest < 0.01:
        return [
            f"{tick:.2e}".replace(".00e", "e").replace("0e", "e").replace("e-0", "e-") if tick else "0"
            for tick in ticks
        ]
    return [f"{round(tick, 10):g}" for tick in ticks]


def _described(title: str, lines: Sequence[Line]) -> str:
    ends = [
        f"{line.label or 'the line'} ends at {line.points[-1][1]:.4g}"
        for line in lines
        if line.points and math.isfinite(line.points[-1][1])
    ]
    return f"{title}: {'; '.join(ends)}" if ends else title


def _style(number: int) -> str:
    return f"line line{number % DASHES}"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
