"""How people read what an objective records: behind the progress line, curves, reports, comparisons and cards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TermMetric:
    """A metric that an objective's term records at every step.

    Attributes:
        name: in ``metrics.jsonl``; what stands before the slash is the objective's name.
        title: of its chart.
        progress: its name on the progress line; None: it is not there.
        compared: whether runs are compared by it, and a run's curves show it.
        zero: whether the axis of its chart begins at 0.
        at_most: what it can be at most, where the axis ends; None: it has no bound.
        smoothed: whether its chart shows a moving mean.
        said_by_layer: a prefix of metrics that say the same layer by layer, and more: where a run has recorded them,
            its curves leave this one out; None: nothing says more.
    """

    name: str
    title: str
    progress: str | None = None
    compared: bool = True
    zero: bool = False
    at_most: float | None = None
    smoothed: bool = True
    said_by_layer: str | None = None
