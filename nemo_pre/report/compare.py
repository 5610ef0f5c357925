"""Runs in comparison: a table of their metrics with differences to the first arm, as text, Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemo_pre.objectives.registry import compared_metrics
from nemo_pre.options import PathText
from nemo_pre.report.arms import Arm, OptionDifference, arrange, option_differences
from nemo_pre.report.intervals import Difference, Estimate, difference, mean_interval
from nemo_pre.report.runs import Run, natural
from nemo_pre.report.table import to_markdown, to_text
from nemo_pre.run_files.outputs import make_output_folder

METRICS = ",".join(["lm/loss", *(metric.name for metric in compared_metrics()), "val/lm_loss", "val/exact_match*"])
TABLE, DATA, CURVES = "comparison.md", "comparison.json", "comparison.png"


@dataclass(frozen=True)
class Cell:
    """One arm in one metric; ``difference`` is None for the baseline and where one of the two has no value."""

    arm: str
    values: dict[str, float]  # by run
    estimate: Estimate | None
    difference: Difference | None


@dataclass(frozen=True)
class Row:
    """A metric at ``step``, the last one that all runs which record it have in common; None if there is none."""

    metric: str
    step: int | None
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """``options`` are those in which the arms differ; ``notes`` is what a reader of the numbers must know."""

    arms: list[Arm]
    rows: list[Row]
    options: list[OptionDifference]
    notes: list[str]
    directory: Path

    def text(self) -> str:
        """The comparison for a terminal, with the names of the files that were written."""
        files = ", ".join(str(self.directory / name) for name in (TABLE, DATA, CURVES))
        return f"{to_text(self)}\n\nwritten: {files}"

    def data(self) -> dict[str, Any]:
        """The comparison for JSON; a value that is not finite is null."""
        return {
            "baseline": self.arms[0].label,
            "arms": [
                {
                    "label": arm.label,
                    "runs": [
                        {"directory": str(run.directory), "seed": run.seed, "last_step": run.last_step}
                        for run in arm.runs
                    ],
                }
                for arm in self.arms
            ],
            "options": {
                found.option: dict(zip([arm.label for arm in self.arms], found.values, strict=True))
                for found in self.options
            },
            "metrics": [_row_data(row) for row in self.rows],
            "notes": self.notes,
        }


def compare(
    runs: Sequence[PathText],
    out: PathText = "comparison",
    metrics: str = METRICS,
    labels: str | None = None,
    average_last: int = 1,
) -> Comparison:
    """Compare runs and print the table: final metrics with 95% intervals over seeds, and differences to the first arm.

    A run is the output directory of nemo-pre train. Runs that differ in nothing but their seed are one arm; or say
    what belongs together by commas: RUN_A1,RUN_A2 RUN_B1,RUN_B2. The first arm is the baseline. Differences are
    paired by seed where both arms have the same seeds (Student's t), else Welch's. Runs of different length are
    compared at the last step that they have in common.

    out is the directory for comparison.md, .json and .png; metrics are patterns, separated by commas; labels name the
    arms, separated by commas; average_last takes the mean of a metric's last records instead of the last one.

    Raises:
        ValueError: a run cannot be read, there is one arm only, or no metric fits.
    """
    if average_last < 1:
        raise ValueError(f"average_last={average_last} averages nothing: give 1 or more records.")
    arms = arrange(runs, [name.strip() for name in labels.split(",")] if labels else [])
    names = _select(arms, metrics)
    rows = [_row(arms, name, average_last) for name in names]
    make_output_folder("out", out)
    comparison = Comparison(arms, rows, option_differences(arms), _notes(arms, rows, average_last), Path(out))
    _write(comparison)
    print(comparison.text())
    return comparison


def _select(arms: Sequence[Arm], patterns: str) -> list[str]:
    """The recorded metrics that fit, pattern by pattern."""
    recorded = sorted({name for arm in arms for run in arm.runs for name in run.series}, key=natural)
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    names = [name for pattern in wanted for name in recorded if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(f"metrics={patterns} fits nothing in these runs: they record {', '.join(recorded)}.")
    return list(dict.fromkeys(names))


def _row(arms: Sequence[Arm], metric: str, average_last: int) -> Row:
    recording = [run.series[metric] for arm in arms for run in arm.runs if metric in run.series]
    common = sorted(set.intersection(*(set(series) for series in recording)))
    if not common:
        return Row(metric, None, [Cell(arm.label, {}, None, None) for arm in arms])
    steps = common[-average_last:]
    values = [{run.directory: _mean(run, metric, steps) for run in arm.runs if metric in run.series} for arm in arms]
    cells = []
    for arm, by_run in zip(arms, values, strict=True):
        change = None
        if arm is not arms[0] and by_run and values[0]:
            change = _difference(arm, by_run, arms[0], values[0])
        estimate = mean_interval(list(by_run.values())) if by_run else None
        cells.append(Cell(arm.label, {str(run): value for run, value in by_run.items()}, estimate, change))
    return Row(metric, steps[-1], cells)


def _mean(run: Run, metric: str, steps: Sequence[int]) -> float:
    return math.fsum(run.series[metric][step] for step in steps) / len(steps)


def _difference(arm: Arm, ours: dict[Path, float], baseline: Arm, theirs: dict[Path, float]) -> Difference:
    if not (arm.by_seed and baseline.by_seed):
        return difference(ours, theirs, matched=False)
    seeds = {run.directory: run.seed for run in [*arm.runs, *baseline.runs]}
    return difference(
        {seeds[run]: value for run, value in ours.items()},
        {seeds[run]: value for run, value in theirs.items()},
        matched=True,
    )


def _notes(arms: Sequence[Arm], rows: Sequence[Row], average_last: int) -> list[str]:
    notes = [f"{run.directory}: {note}" for arm in arms for run in arm.runs for note in run.notes]
    ends = {str(run.directory): run.last_step for arm in arms for run in arm.runs}
    if len(set(ends.values())) > 1:
        listed = ", ".join(f"{name} {step}" for name, step in ends.items())
        notes.append(f"The runs end at different steps ({listed}): each metric is compared at the last common step.")
    for row in rows:
        if row.step is None:
            notes.append(f"{row.metric}: the runs that record it have no step in common, so it is not compared.")
        elif absent := [cell.arm for cell in row.cells if cell.estimate is None]:
            notes.append(f"{row.metric}: not recorded by {', '.join(absent)}.")
    for arm in arms:
        if len(arm.runs) == 1:
            notes.append(f"{arm.label}: one run (n=1), so there is no interval.")
        elif len({run.seed for run in arm.runs if run.seed is not None}) < len(arm.runs):
            notes.append(f"{arm.label}: runs share a seed or theirs is unknown, so nothing is paired with them.")
    if average_last > 1:
        notes.append(f"Values are means over each run's last {average_last} common records.")
    return notes


def _write(comparison: Comparison) -> None:
    from nemo_pre.report.curves import draw

    out = comparison.directory
    out.mkdir(parents=True, exist_ok=True)
    (out / TABLE).write_text(to_markdown(comparison), encoding="utf-8")
    (out / DATA).write_text(json.dumps(comparison.data(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw(comparison.arms, [row.metric for row in comparison.rows], out / CURVES)


def _row_data(row: Row) -> dict[str, Any]:
    return {
        "metric": row.metric,
        "step": row.step,
        "arms": [
            {
                "arm": cell.arm,
                "values": {run: _finite(value) for run, value in cell.values.items()},
                "mean": _estimate_data(cell.estimate),
                "difference": cell.difference
                and {**_estimate_data(cell.difference.estimate), "method": cell.difference.method},
            }
            for cell in row.cells
        ],
    }


def _estimate_data(estimate: Estimate | None) -> Any:
    return estimate and {
        "value": _finite(estimate.value),
        "low": _finite(estimate.low),
        "high": _finite(estimate.high),
        "n": estimate.n,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
