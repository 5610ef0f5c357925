"""95% confidence intervals: of a mean over seeds, of the difference of two arms, of a share of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """``low`` and ``high`` are None where ``n`` values give no interval: fewer than two, one not finite, all equal."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline. ``method``: ``paired t``, ``Welch``, or ``single runs`` where one has only one."""

    estimate: Estimate
    method: str

    @property
    def excludes_zero(self) -> bool:
        low, high = self.estimate.low, self.estimate.high
        return low is not None and high is not None and (low > 0 or high < 0)


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean with Student's t interval, n - 1 degrees of freedom."""
    n = len(values)
    assert n
    mean = math.fsum(values) / n if all(map(math.isfinite, values)) else math.nan
    if n < 2 or not math.isfinite(mean):
        return Estimate(mean, None, None, n)
    return _around(mean, math.sqrt(_variance(values) / n), n - 1, n)


def difference(arm: Mapping[Any, float], baseline: Mapping[Any, float], matched: bool) -> Difference:
    """Mean of ``arm`` minus mean of ``baseline``, both by run or, if ``matched``, by seed.

    Paired by seed where both have the same ones (Student's t on the pairs' differences), else with Welch's unequal
    variances and the Welch-Satterthwaite degrees of freedom.
    """
    if matched and arm.keys() == baseline.keys() and len(arm) > 1:
        return Difference(mean_interval([arm[seed] - baseline[seed] for seed in arm]), "paired t")
    ours, theirs = list(arm.values()), list(baseline.values())
    n = min(len(ours), len(theirs))
    shift = mean_interval(ours).value - mean_interval(theirs).value
    method = "Welch" if n > 1 else "single runs"
    if n < 2 or not math.isfinite(shift):
        return Difference(Estimate(shift, None, None, n), method)
    a, b = _variance(ours) / len(ours), _variance(theirs) / len(theirs)
    freedom = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1)) if a + b else 1.0
    return Difference(_around(shift, math.sqrt(a + b), freedom, n), method)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a binomial share; (0, 1) without answers."""
    from scipy.stats import norm

    assert 0 <= correct <= total
    if not total:
        return 0.0, 1.0
    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    share = correct / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # At the ends the rounding error must not leave the share outside.
    return (0.0 if not correct else middle - half), (1.0 if correct == total else middle + half)


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _around(value: float, error: float, freedom: float, n: int) -> Estimate:
    from scipy.stats import t

    if error <= 1e-12 * abs(value):  # equal, as counts of few answers can be: no spread to judge by, not certainty
        return Estimate(value, None, None, n)
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Estimate(value, value - half, value + half, n)
