"""A run's directory as data: its metrics over steps and its options by dotted name. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_pre.plots import SMOOTH_OVER, _moving_mean
from nemo_pre.run_files.metrics import METRICS, read_metrics

CONFIG = "config.yaml"
SEEDS = ("seed", "data.shuffle_seed")

Series = dict[int, float]  # by step


@dataclass(frozen=True)
class Run:
    """``series`` by metric, with nan where a value was not finite; ``options`` None where there is no config.yaml.

    Attributes:
        started, ended: seconds since 1970 of the first and the last record.
        notes: sentences on what is missing or damaged.
    """

    directory: Path
    series: dict[str, Series]
    options: dict[str, Any] | None
    last_step: int
    started: float | None
    ended: float | None
    notes: list[str] = field(default_factory=list)

    @property
    def seed(self) -> tuple[Any, ...] | None:
        """The seeds of weights and data order, None where unknown."""
        return tuple(self.options.get(name) for name in SEEDS) if self.options is not None else None

    def last(self, metric: str) -> float | None:
        """The last recorded value, None if there is none."""
        series = self.series.get(metric)
        return series[max(series)] if series else None


def read_run(directory: str | Path) -> Run:
    """Reads ``metrics.jsonl`` and ``config.yaml``; of a step recorded twice the last record counts.

    Raises:
        ValueError: no such run, no metrics, or a config that cannot be read.
    """
    directory = Path(directory)
    file = directory / METRICS
    if not file.is_file():
        raise ValueError(f"{directory} has no {METRICS}: give the output directory of a run that has trained.")
    lines = [line for line in read_metrics(file) if isinstance(line["step"], int)]
    torn = sum(bool(text.strip()) for text in file.read_bytes().splitlines()) - len(lines)
    if not lines:
        what = "lines, but none can be read" if torn else "no metrics yet"
        raise ValueError(f"{file} has {what}: give a run that has trained at least a step.")
    options = _read_options(directory / CONFIG)
    times = [line["time"] for line in lines if isinstance(line.get("time"), (int, float))]
    series = _series(lines)
    last_step = max(line["step"] for line in lines)
    notes = _notes(torn, options, last_step, series)
    return Run(directory, series, options, last_step, min(times, default=None), max(times, default=None), notes)


def _series(lines: list[dict[str, Any]]) -> dict[str, Series]:
    by_name: dict[str, Series] = {}
    for line in lines:
        for name, value in line.items():
            # The record of a value that was not finite is null.
            if name not in ("step", "time") and (value is None or isinstance(value, (int, float))):
                by_name.setdefault(name, {})[line["step"]] = math.nan if value is None else float(value)
    return {name: dict(sorted(series.items())) for name, series in by_name.items()}


def _notes(torn: int, options: dict[str, Any] | None, last_step: int, series: dict[str, Series]) -> list[str]:
    notes = []
    if torn:
        notes.append(f"{METRICS} has {torn} torn line(s), as a killed run leaves; left out.")
    if options is None:
        notes.append(f"There is no {CONFIG}, so its options and seed are unknown.")
    elif isinstance(planned := options.get("trainer.max_steps"), int) and last_step < planned:
        notes.append(f"The run stopped at step {last_step} of {planned}.")
    for metric, values in series.items():
        missing = [step for step, value in values.items() if not math.isfinite(value)]
        if missing:
            notes.append(
                f"{metric} is not finite in {len(missing)} of {len(values)} records, first at step {missing[0]}."
            )
    return notes


def _read_options(file: Path) -> dict[str, Any] | None:
    """Every option by its dotted name; one that is younger than the run has its default there."""
    if not file.is_file():
        return None
    from omegaconf import OmegaConf

    from nemo_pre.config.run import RunConfig

    try:
        given = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:  # YAML's and OmegaConf's own kinds
        first = str(error).splitlines()[0]
        raise ValueError(f"{file} cannot be read ({first}): restore it, or move it away to do without.") from error
    if not isinstance(given, dict):
        raise ValueError(f"{file} holds no options: restore it, or move it away to do without.")
    defaults = OmegaConf.to_container(OmegaConf.structured(RunConfig), resolve=False)
    assert isinstance(defaults, dict)
    return {**_dotted(defaults), **_dotted(given)}


def _dotted(options: dict[Any, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _dotted(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat


def smooth(values: Sequence[float]) -> list[float]:
    """Moving mean of the finite values over a fiftieth of the curve, as in ``curves.png``; nan stays where it is."""
    finite = [value for value in values if math.isfinite(value)]
    means = iter(_moving_mean(finite, max(1, len(finite) // SMOOTH_OVER)))
    return [next(means) if math.isfinite(value) else math.nan for value in values]


def natural(name: str) -> list[Any]:
    """Sorting key by which layer_2 stands before layer_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
