"""Intervals against values worked by hand and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nemo_pre.report.intervals import difference, mean_interval, wilson


def test_the_mean_of_three_by_hand() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    # s = 1, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653
    assert (found.value, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)


def test_one_value_and_values_without_spread_have_no_interval() -> None:
    for values in ([0.5], [0.1, 0.1, 0.1]):
        found = mean_interval(values)
        assert found.value == pytest.approx(values[0])
        assert found.low is None and found.high is None


def test_a_value_that_is_not_finite_is_not_averaged_away() -> None:
    found = mean_interval([1.0, math.nan, 2.0])
    assert math.isnan(found.value) and found.low is None
    assert math.isnan(difference({1: 1.0, 2: math.inf}, {3: 1.0, 4: 2.0}, matched=False).estimate.value)


def test_equal_seeds_are_paired() -> None:
    arm, baseline = {1: 3.0, 2: 5.0, 3: 8.0}, {3: 6.0, 1: 2.5, 2: 4.0}
    found = difference(arm, baseline, matched=True)
    expected = stats.ttest_rel([3.0, 5.0, 8.0], [2.5, 4.0, 6.0]).confidence_interval(0.95)
    assert found.method == "paired t" and found.estimate.n == 3
    assert found.estimate.value == pytest.approx(3.5 / 3)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("matched", [True, False])
def test_other_seeds_are_compared_by_welch(matched: bool) -> None:
    arm, baseline = {1: 3.0, 2: 5.0, 3: 8.0}, {4: 2.5, 5: 4.0}
    found = difference(arm, baseline, matched)
    expected = stats.ttest_ind(list(arm.values()), list(baseline.values()), equal_var=False).confidence_interval(0.95)
    assert found.method == "Welch"
    assert (found.estimate.low, found.estimate.high) == pytest.approx((expected.low, expected.high))


def test_a_difference_excludes_zero_only_by_its_interval() -> None:
    baseline = {1: 1.0, 2: 2.0, 3: 3.0}
    far = {seed: value + 5 + 0.01 * seed for seed, value in baseline.items()}
    near = {1: 1.5, 2: 1.8, 3: 3.1}
    assert difference(far, baseline, matched=True).excludes_zero
    assert not difference(near, baseline, matched=True).excludes_zero
    assert not difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}, matched=True).excludes_zero  # equal by chance: no spread
    alone = difference({1: 2.0}, {1: 1.0}, matched=True)
    assert alone.estimate.value == 1.0 and alone.method == "single runs" and not alone.excludes_zero


def test_wilsons_interval_is_scipys() -> None:
    for correct, total in [(0, 12), (12, 12), (1, 3), (44, 256)]:
        expected = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
        assert wilson(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(2000, 4))
    intervals = [mean_interval(list(map(float, row))) for row in samples]
    covered = [found.low <= 0 <= found.high for found in intervals if found.low is not None and found.high is not None]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)
