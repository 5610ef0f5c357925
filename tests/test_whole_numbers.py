"""Parts of totals are the whole numbers that are meant, where floats' products lie beside them."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import pytest

from data_prep.digits.build import Parameters
from data_prep.prepare.blend import Source
from data_prep.stats.summary import quantiles
from nemo_pre.config.compose import compose_run
from nemo_pre.objectives.laver import LaVer
from nemo_pre.objectives.laver.masks import visual_token_masks
from nemo_pre.objectives.laver.schedules import mask_ratio, update_interval
from nemo_pre.whole_numbers import part_down, part_nearest, part_up

HUNDREDTHS = [(number / 100, Fraction(number, 100)) for number in range(101)]
THOUSANDTHS = [(number / 1000, Fraction(number, 1000)) for number in range(0, 1001, 7)]


def test_parts_are_those_of_the_written_fraction():
    beside = 0
    for part, written in HUNDREDTHS + THOUSANDTHS:
        for total in (1, 3, 50, 99, 100, 200, 576, 1000, 5197, 10**6):
            assert part_down(part, total) == floor(written * total), (part, total)
            assert part_up(part, total) == ceil(written * total), (part, total)
            assert part_nearest(part, total) == round(written * total), (part, total)
            beside += floor(part * total) != floor(written * total) or ceil(part * total) != ceil(written * total)
    assert beside > 20, "no product of these floats lies beside what is meant: the test cannot fail"


@pytest.mark.parametrize(("part", "total"), [(0.999999, 1000), (1e-6, 10**6 - 1), (0.5 + 1e-9, 10**6 + 1)])
def test_what_is_truly_less_stays_less(part, total):
    assert part_down(part, total) == floor(Fraction(str(part)) * total)
    assert part_up(part, total) == ceil(Fraction(str(part)) * total)


def test_masks_of_a_count_are_as_many_as_the_ratio_says():
    for ratio, size, count in ((0.29, 100, 29), (0.57, 100, 57), (0.07, 300, 21), (0.3, 29, 8), (1.0, 9, 9)):
        assert int(visual_token_masks([1], [size], ratio, "count", 0, 0, 0).sum()) == count, (ratio, size)


def test_a_ratio_that_a_schedule_computed_counts_as_what_it_stands_for():
    """Half of the ramp to 0.05 is 0.024999999999999998."""
    half = mask_ratio("cosine", 3, 6, 0.05)
    assert half < 0.025 and int(visual_token_masks([1], [400], half, "count", 0, 0, 0).sum()) == 10


def test_the_teachers_interval_is_the_fraction_of_the_run():
    assert [update_interval(1, fraction, 100) for fraction in (0.29, 0.57, 0.58, 0.02, 0.001)] == [29, 57, 58, 2, 1]


def test_a_plan_counts_the_masked_tokens_of_the_written_ratio():
    config = compose_run(["experiment=digits-laver", "objective.laver.mask_ratio=0.07"])
    branch = LaVer(config).build_cost().branch(visual=100, length=128, multiple=1)
    assert branch.masked == 7, "7.000000000000001 is no reason for an eighth"


def test_splits_and_quantiles_follow_the_written_share(tmp_path):
    assert Parameters(1000, 0, 0.29, 64).split_sizes() == {"train": 710, "val": 290}
    assert Parameters(50, 0, 0.29, 64).split_sizes()["val"] == round(Fraction("14.5"))
    assert quantiles(dict.fromkeys(range(1, 701), 1))["p99"] == 693
    source = Source(name="a", kind="llava", path=tmp_path, weight=0.35)
    assert source.num_taken(70) == round(Fraction("24.5"))
