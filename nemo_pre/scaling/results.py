"""One point of a study with its figures, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nemo_pre.scaling.grid import Point

Source = Literal["simulated", "measured"]
SIMULATED = "simulated by nemo-pre's planner, never measured"


@dataclass(frozen=True)
class Result:
    """Figures of a point, None where there are none.

    Attributes:
        source: the planner's model, or a finished run.
        problem: why there are no figures.
        parameters: of the language model.
        layout: in words.
        words: of ``nemo-pre train``, that give exactly this run.
        target_layers: of the objectives that have any.
        batch_size: samples of a step.
        samples: of the whole recipe, whatever batch and steps the study gives its runs.
        step_seconds: of a step; measured, the median.
        bytes: of the fullest rank; simulated only, as the next two.
        utilization: of the GPUs' bf16 peak.
        flops: of a step.
        quality: last values of what a finished run recorded.
    """

    point: Point
    source: Source
    problem: str | None = None
    parameters: int = 0
    layout: str = ""
    words: list[str] = field(default_factory=list)
    target_layers: list[int] = field(default_factory=list)
    batch_size: int = 0
    samples: int = 0
    step_seconds: float | None = None
    bytes: int | None = None
    utilization: float | None = None
    flops: float | None = None
    quality: dict[str, float] = field(default_factory=dict)

    @property
    def samples_per_second(self) -> float | None:
        return None if self.step_seconds is None else self.batch_size / self.step_seconds

    @property
    def days(self) -> float | None:
        rate = self.samples_per_second
        return None if rate is None else self.samples / rate / 86400

    @property
    def gpu_hours(self) -> float | None:
        return None if self.days is None else self.days * 24 * self.point.gpus

    def as_json(self) -> dict[str, Any]:
        derived = ("samples_per_second", "days", "gpu_hours")
        return {"name": self.point.name, **asdict(self), **{name: getattr(self, name) for name in derived}}


def overheads(results: Sequence[Result]) -> dict[str, list[tuple[Result, float]]]:
    """Time of a sample, by regularizer, beside the same point's without one, each in its own layout."""
    plain = {_compared_at(result): result for result in results if result.point.regularizer == "none"}
    found: dict[str, list[tuple[Result, float]]] = {}
    for result in results:
        beside = plain.get(_compared_at(result))
        if result.point.regularizer in ("none", "recipe") or beside is None:
            continue
        ours, theirs = result.samples_per_second, beside.samples_per_second
        if ours is not None and theirs is not None:
            found.setdefault(result.point.regularizer, []).append((result, theirs / ours))
    return found


def _compared_at(result: Result) -> tuple[Any, ...]:
    point = result.point
    return point.experiment, point.gpus, point.layout, point.batch, result.source
