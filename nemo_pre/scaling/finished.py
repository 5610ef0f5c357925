"""A point of a study as its finished run recorded it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import median

from nemo_pre.objectives.registry import compared_metrics
from nemo_pre.report.runs import Run, read_run
from nemo_pre.run_files.metrics import METRICS
from nemo_pre.scaling.results import Result
from nemo_pre.whole_numbers import part_down

STEP_TIME = "step_time"
WARM_UP = 0.1  # of the recorded steps, whose times do not count
QUALITY = {"lm/loss", *(metric.name for metric in compared_metrics())}


def measured(planned: Result, run_dir: Path) -> Result | None:
    """The point with what its run recorded in place of what was simulated; None: it has recorded no step yet.

    Raises:
        ValueError: the run's files cannot be read, or are of another batch.
    """
    if not (run_dir / METRICS).is_file():
        return None
    run = read_run(run_dir)
    times = _step_times(run)
    if not times:
        return None
    batch = (run.options or {}).get("trainer.global_batch_size", planned.batch_size)
    if batch != planned.batch_size:
        raise ValueError(f"{run_dir} has batches of {batch} samples, the grid of {planned.batch_size}: give its grid.")
    return replace(
        planned,
        source="measured",
        problem=None,
        step_seconds=median(times),
        bytes=None,
        utilization=None,
        flops=None,
        quality={name: value for name in run.series if (value := _last(run, name)) is not None},
    )


def _step_times(run: Run) -> list[float]:
    recorded = [seconds for seconds in run.series.get(STEP_TIME, {}).values() if math.isfinite(seconds)]
    return recorded[part_down(WARM_UP, len(recorded)) :]


def _last(run: Run, name: str) -> float | None:
    return run.last(name) if name in QUALITY or name.startswith("val/") else None
