"""Which curves of a run its report shows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from nemo_pre.objectives.registry import term_metrics
from nemo_pre.plots import EXACT_MATCH
from nemo_pre.report.answers import question_metrics
from nemo_pre.report.charts import Line, line_chart
from nemo_pre.report.runs import Run, natural, smooth


def training_charts(run: Run) -> list[str]:
    terms = {name: name.partition("/")[2] or "all" for name in run.series if name.partition("/")[0] == "grad_norm"}
    return [
        *_chart(run, "Language-model loss (nats per token)", {"lm/loss": "training", "val/lm_loss": "validation"}),
        *_chart(run, "Gradient norm", terms, zero=True),
        *_chart(run, "Learning rate", {"lr": ""}, zero=True, smoothed=False),
    ]


def exact_match_charts(run: Run) -> list[str]:
    """Exact match over training, where there was more than one validation."""
    if len(run.series.get(EXACT_MATCH, {})) < 2:
        return []
    named = {"all questions": EXACT_MATCH, **question_metrics(run)}
    return [chart for kind, metric in named.items() for chart in _chart(run, kind, {metric: ""}, y_range=[(0, 1)])]


def regularizer_charts(run: Run) -> list[str]:
    terms = [
        chart
        for metric in term_metrics()
        for chart in _chart(run, metric.title, {metric.name: ""}, zero=metric.zero, smoothed=metric.smoothed)
    ]
    return [*terms, *_similarity_by_layer(run)]


def _chart(
    run: Run,
    title: str,
    metrics: dict[str, str],
    zero: bool = False,
    y_range: Sequence[tuple[float, float]] = (),
    smoothed: bool = True,
) -> list[str]:
    """A chart of those ``metrics`` (name: label) that the run has, if it has any that is finite somewhere."""
    lines = []
    for metric, label in metrics.items():
        series = run.series.get(metric, {})
        if any(map(math.isfinite, series.values())):
            steps, values = list(series), list(series.values())
            means = smooth(values) if smoothed else values
            faint = list(zip(steps, values, strict=True)) if means != values else []
            lines.append(Line(label, list(zip(steps, means, strict=True)), faint))
    return [line_chart(title, lines, "step", zero, y_range)] if lines else []


def _similarity_by_layer(run: Run) -> list[str]:
    """How visual tokens become alike from layer to layer, at the first and at the last record."""
    layers = sorted((name for name in run.series if re.fullmatch(r"similarity/layer_\d+", name)), key=natural)
    if not layers:
        return []
    steps = sorted(set.intersection(*(set(run.series[name]) for name in layers)))
    ends = list(dict.fromkeys([steps[0], steps[-1]])) if steps else []
    lines = [
        Line(f"step {step:,}", [(int(name.rsplit("_", 1)[1]), run.series[name][step]) for name in layers])
        for step in ends
    ]
    return [line_chart("Mean cosine of an image's visual tokens", lines, "layer")] if lines else []
