"""Curves of one run, or of several in comparison, drawn from ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pre.objectives.registry import compared_metrics

CURVES = "curves.png"
EXACT_MATCH = "val/exact_match"
SIMILARITY = "similarity/layer_"
# Okabe and Ito's palette: told apart with colour-blind eyes and on paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
SMOOTH_OVER = 50  # steps of the moving mean are the run's length divided by this

Points = tuple[list[int], list[float]]


def plot_run(run_dir: str | Path) -> Path:
    """Draw ``run_dir/curves.png`` over steps: loss, the regularizers' terms, similarity and exact match.

    Raises:
        ValueError: there is nothing to draw.
    """
    return plot_runs({"": run_dir}, Path(run_dir) / CURVES)


def plot_runs(runs: Mapping[str, str | Path], out: str | Path) -> Path:
    """Draw several runs (label: directory) into one figure ``out``: a line style per run.

    Raises:
        ValueError: a run has no metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = {label: _series(directory) for label, directory in runs.items()}
    recorded = {name for run in series.values() for name in run}
    panels = [panel for panel in _panels(recorded) if any(name in recorded for name, _ in panel.shown)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), sharex=True, squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        axis.set_title(panel.title)
        _lines(axis, series, panel.shown, marker="o" if panel.rare else None)
        axis.set_ylim(bottom=panel.bottom, top=panel.top)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
        if axis.get_legend_handles_labels()[0]:
            # Of a kind of question each: too many entries to lie on the curves.
            place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if panel.rare else {"loc": "best"}
            axis.legend(fontsize=8, frameon=False, **place)
    figure.tight_layout()
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _series(run_dir: str | Path) -> dict[str, Points]:
    """Every metric of a run as steps and values; a step recorded twice counts as it was recorded last."""
    from nemo_pre.run_files.metrics import METRICS, read_metrics

    file = Path(run_dir) / METRICS
    if not file.is_file():
        raise ValueError(f"{run_dir} has no {METRICS}: give the output directory of a run that has trained.")
    by_name: dict[str, dict[int, float]] = {}
    for line in read_metrics(file):
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in ("step", "time"):
                by_name.setdefault(name, {})[line["step"]] = value
    if not by_name:
        raise ValueError(f"{file} has no metrics yet: let the run do a step.")
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in by_name.items()}


@dataclass(frozen=True)
class _Panel:
    """Metrics with their labels, and where the axis ends; ``rare``: so few points that each is marked."""

    title: str
    shown: list[tuple[str, str]]
    bottom: float | None = None
    top: float | None = None
    rare: bool = False


def _panels(recorded: set[str]) -> list[_Panel]:
    by_layer = sorted(
        (name for name in recorded if name.startswith(SIMILARITY)), key=lambda name: int(name.removeprefix(SIMILARITY))
    )
    kinds = sorted(name for name in recorded if name.startswith(EXACT_MATCH))
    return [
        _Panel("language-model loss", [("lm/loss", "train"), ("val/lm_loss", "validation")], bottom=0),
        *(
            _Panel(metric.title, [(metric.name, "")], 0 if metric.zero else None, metric.at_most)
            for metric in compared_metrics()
            if metric.said_by_layer is None or not any(name.startswith(metric.said_by_layer) for name in recorded)
        ),
        _Panel(
            "mean cosine of an image's visual tokens",
            [(name, f"layer {name.removeprefix(SIMILARITY)}") for name in by_layer],
            top=1,
        ),
        _Panel(
            "exact match of validation answers",
            [(name, name.removeprefix(EXACT_MATCH).lstrip("/") or "all") for name in kinds],
            -0.02,
            1.02,
            rare=True,
        ),
    ]


def _lines(
    axis: Any, series: Mapping[str, dict[str, Points]], shown: list[tuple[str, str]], marker: str | None = None
) -> None:
    """A colour per metric, a line style per run; with a single metric the runs take the colours."""
    by_run = len(shown) == 1
    named: set[str] = set()
    for run_number, (run_label, run) in enumerate(series.items()):
        for number, (name, label) in enumerate(shown):
            if name not in run:
                continue
            steps, values = run[name]
            colour = COLOURS[(run_number if by_run else number) % len(COLOURS)]
            window = max(1, len(values) // SMOOTH_OVER)
            if window > 1 and marker is None:
                axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
                values = _moving_mean(values, window)
            entry = run_label if by_run else label
            axis.plot(
                steps,
                values,
                color=colour,
                linestyle="-" if by_run else STYLES[run_number % len(STYLES)],
                marker=marker,
                markersize=3,
                linewidth=2.2 if label == "all" else 1.4,
                label=entry if entry and entry not in named else None,
            )
            named.add(entry)
    if not by_run and len(series) > 1:  # in the legend the runs' styles stand below the metrics' colours
        for run_number, run_label in enumerate(series):
            axis.plot([], [], color="grey", linestyle=STYLES[run_number % len(STYLES)], label=run_label)


def _moving_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to ``window - 1`` before it."""
    means, total = [], 0.0
    for number, value in enumerate(values):
        total += value
        if number >= window:
            total -= values[number - window]
        means.append(total / min(number + 1, window))
    return means
