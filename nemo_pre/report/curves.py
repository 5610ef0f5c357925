"""Curves of arms in comparison: means over runs with bands; a metric of one step as points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pre.plots import COLOURS, STYLES
from nemo_pre.report.arms import Arm
from nemo_pre.report.intervals import mean_interval
from nemo_pre.report.runs import smooth

COLUMNS = 3
FOOT = 0.75  # inches, for legend and caption
CAPTION = "thin: each run; thick: mean over runs; band or bar: its 95% interval (Student's t), cut off by the frame"

Curve = tuple[list[int], list[float]]


def draw(arms: Sequence[Arm], metrics: Sequence[str], out: Path) -> None:
    """A panel per metric into the PNG ``out``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    height = 3.3 * rows + FOOT
    figure, axes = pyplot.subplots(rows, columns, figsize=(max(4.6 * columns, 7), height), squeeze=False)
    for metric, axis in zip(metrics, axes.flat, strict=False):
        axis.set_title(metric, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        _panel(axis, arms, metric)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    handles = [_legend_entry(pyplot, number, arm) for number, arm in enumerate(arms)]
    figure.tight_layout(rect=(0, FOOT / height, 1, 1))
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.3 / height)}
    figure.legend(handles=handles, ncols=min(len(arms), 2 * columns), fontsize=9, frameon=False, **place)
    figure.text(0.5, 0.12 / height, CAPTION, ha="center", va="bottom", fontsize=7, color="0.4")
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, arms: Sequence[Arm], metric: str) -> None:
    curves = {
        number: [_curve(run.series[metric]) for run in arm.runs if metric in run.series]
        for number, arm in enumerate(arms)
    }
    if any(len(steps) > 1 for drawn in curves.values() for steps, _ in drawn):
        for number, drawn in curves.items():
            style = STYLES[number // len(COLOURS) % len(STYLES)]
            _lines(axis, drawn, COLOURS[number % len(COLOURS)], style, opacity=0.3 / len(arms))
        axis.set_xlabel("step")
        axis.set_xlim(left=0)
    else:
        for number, drawn in curves.items():
            _points(axis, number, [values[0] for _, values in drawn], COLOURS[number % len(COLOURS)])
        axis.set_xlim(-0.6, len(arms) - 0.4)
        axis.set_xticks([])
        steps = sorted({step for drawn in curves.values() for found, _ in drawn for step in found})
        axis.set_xlabel("step " + ", ".join(map(str, steps)))
    # An interval over two seeds can be ten times as wide as the runs are apart: the runs set the frame.
    shown = [value for drawn in curves.values() for _, values in drawn for value in values if math.isfinite(value)]
    if shown:
        margin = 0.08 * (max(shown) - min(shown)) or 0.1 * abs(shown[0]) or 0.1
        axis.set_ylim(min(shown) - margin, max(shown) + margin)


def _curve(series: dict[int, float]) -> Curve:
    return list(series), smooth(list(series.values()))


def _lines(axis: Any, curves: Sequence[Curve], colour: str, style: str, opacity: float) -> None:
    if not curves:
        return
    if len(curves) > 1:
        for steps, values in curves:
            axis.plot(steps, values, color=colour, alpha=0.35, linewidth=0.6)
    by_step = [dict(zip(steps, values, strict=True)) for steps, values in curves]
    common = sorted(set.intersection(*(set(values) for values in by_step)))
    means = [mean_interval([values[step] for values in by_step]) for step in common]
    axis.plot(common, [mean.value for mean in means], color=colour, linestyle=style, linewidth=1.6)
    banded = [(step, mean) for step, mean in zip(common, means, strict=True) if mean.low is not None]
    axis.fill_between(
        [step for step, _ in banded],
        [mean.low for _, mean in banded],
        [mean.high for _, mean in banded],
        color=colour,
        alpha=opacity,
        linewidth=0,
    )


def _points(axis: Any, place: int, values: Sequence[float], colour: str) -> None:
    if not values:
        return
    mean = mean_interval(values)
    if mean.low is not None:
        axis.plot([place, place], [mean.low, mean.high], color=colour, linewidth=1.2, alpha=0.6)
    axis.plot([place] * len(values), values, "o", color=colour, markersize=4, alpha=0.5)
    axis.plot([place - 0.22, place + 0.22], [mean.value] * 2, color=colour, linewidth=2.2)


def _legend_entry(pyplot: Any, number: int, arm: Arm) -> Any:
    runs = f" (n={len(arm.runs)})"
    style = STYLES[number // len(COLOURS) % len(STYLES)]
    return pyplot.Line2D([], [], color=COLOURS[number % len(COLOURS)], linestyle=style, label=arm.label + runs)
