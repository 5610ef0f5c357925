"""What a run records of its regularizers, and how people read it: the one list behind the progress line, the curves,
the reports, the comparisons and the cards of exported models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TermMetric:
    """A metric that an objective's callback logs.

    Attributes:
        name: in ``metrics.jsonl``, the term's name before the slash.
        title: of its chart.
        progress: its name on the progress line; None: it is not there.
        compared: whether runs are compared by it, and a run's curves show it.
        zero: whether the axis of its chart begins at 0.
        at_most: what it can be at most, where the axis ends; None: it has no bound.
        smoothed: whether its chart shows a moving mean.
    """

    name: str
    title: str
    progress: str | None = None
    compared: bool = True
    zero: bool = False
    at_most: float | None = None
    smoothed: bool = True


TERM_METRICS = (
    TermMetric("pre/cosine", "PRe: cosine of prediction and anchor", progress="pre/cosine", at_most=1),
    TermMetric("pre/weight", "PRe: its weight", compared=False, zero=True, smoothed=False),
    TermMetric("laver/mim", "LaVer: masked prediction (nats)", progress="mim", zero=True),
    TermMetric("laver/gram", "LaVer: Gram-anchoring", progress="gram", zero=True),
    TermMetric(
        "laver/similarity", "LaVer: mean cosine of visual tokens, head's output", progress="similarity", at_most=1
    ),
    TermMetric("laver/teacher_entropy", "LaVer: entropy of the teacher (nats)", compared=False, zero=True),
)
COMPARED = tuple(metric for metric in TERM_METRICS if metric.compared)
# What the names of all of an objective's metrics begin with.
TERMS = tuple(dict.fromkeys(metric.name.partition("/")[0] + "/" for metric in TERM_METRICS))
