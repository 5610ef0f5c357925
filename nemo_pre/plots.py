"""Curves of one run, or of several in comparison, drawn from ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CURVES = "curves.png"
EXACT_MATCH = "val/exact_match"
# Okabe and Ito's palette: told apart with colour-blind eyes and on paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
SMOOTH_OVER = 50  # steps of the moving mean are the run's length divided by this

Points = tuple[list[int], list[float]]


def plot_run(run_dir: str | Path) -> Path:
    """Draw ``run_dir/curves.png`` over steps: loss, PRe's cosine, LaVer's terms, similarity and exact match.

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
    known = (_loss, _cosine, _masked_prediction, _gram, _similarity, _exact_match)
    panels = [panel for panel in known if panel(None, series)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), sharex=True, squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        panel(axis, series)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
        if axis.get_legend_handles_labels()[0]:
            beside = panel is _exact_match  # too many entries to lie on the curves
            place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if beside else {"loc": "best"}
            axis.legend(fontsize=8, frameon=False, **place)
    figure.tight_layout()
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _series(run_dir: str | Path) -> dict[str, Points]:
    """Every metric of a run as steps and values; a step recorded twice counts as it was recorded last."""
    from nemo_pre.callbacks.metrics_file import METRICS, read_metrics

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


# A panel draws itself on ``axis`` and tells whether there is something to draw; with None it only tells.


def _loss(axis: Any, series: Mapping[str, dict[str, Points]]) -> bool:
    shown = [("lm/loss", "train"), ("val/lm_loss", "validation")]
    if axis is not None:
        axis.set_title("language-model loss")
        _lines(axis, series, shown)
        axis.set_ylim(bottom=0)
    return any(name in run for run in series.values() for name, _ in shown)


def _cosine(axis: Any, series: Mapping[str, dict[str, Points]]) -> bool:
    if axis is not None:
        axis.set_title("PRe: cosine of prediction and anchor")
        _lines(axis, series, [("pre/cosine", "")])
        axis.set_ylim(top=1)
    return any("pre/cosine" in run for run in series.values())


def _masked_prediction(axis: Any, series: Mapping[str, dict[str, Points]]) -> bool:
    if axis is not None:
        axis.set_title("LaVer: masked prediction (nats)")
        _lines(axis, series, [("laver/mim", "")])
        axis.set_ylim(bottom=0)
    return any("laver/mim" in run for run in series.values())


def _gram(axis: Any, series: Mapping[str, dict[str, Points]]) -> bool:
    if axis is not None:
        axis.set_title("LaVer: Gram-anchoring")
        _lines(axis, series, [("laver/gram", "")])
        axis.set_ylim(bottom=0)
    return any("laver/gram" in run for run in series.values())


def _similarity(axis: Any, series: Mapping[str, dict[str, Points]]) -> bool:
    """By layer where that is recorded, else the student's head alone."""
    layers = sorted(
        {name for run in series.values() for name in run if name.startswith("similarity/layer_")},
        key=lambda name: int(name.rsplit("_", 1)[1]),
    )
    shown = [(name, name.removeprefix("similarity/").replace("_", " ")) for name in layers]
    shown = shown or [("laver/similarity", "")]
    if axis is not None:
        axis.set_title("mean cosine of an image's visual tokens")
        _lines(axis, series, shown)
        axis.set_ylim(top=1)
    return any(name in run for run in series.values() for name, _ in shown)


def _exact_match(axis: Any, series: Mapping[str, dict[str, Points]]) -> bool:
    kinds = sorted({name for run in series.values() for name in run if name.startswith(EXACT_MATCH)})
    if axis is not None:
        axis.set_title("exact match of validation answers")
        _lines(
            axis, series, [(name, name.removeprefix(EXACT_MATCH).lstrip("/") or "all") for name in kinds], marker="o"
        )
        axis.set_ylim(-0.02, 1.02)
    return bool(kinds)


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
