"""A learning rate per module: applied once, at every step, on every rank, after a resume, and 0 means 0."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.compat import learning_rate_ranks as ranks
from tests.compat.jobs import run_jobs
from tests.compat.tiny_gpt import Layout


def scheduled(step):
    """The unscaled rate of NeMo's CosineAnnealing, by hand."""
    if step <= ranks.WARMUP:
        return ranks.BASE * (step + 1) / (ranks.WARMUP + 1)
    if step > ranks.STEPS:
        return ranks.FLOOR
    progress = (step - ranks.WARMUP) / (ranks.STEPS - ranks.WARMUP)
    return ranks.FLOOR + (ranks.BASE - ranks.FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


RESUMED = {  # the layout that saved, and the one that went on
    "pipeline=2 to 1 rank": (Layout(pipeline=2, distributed_optimizer=True), Layout(distributed_optimizer=True)),
    "tensor=2 to pipeline=2": (
        Layout(tensor=2, distributed_optimizer=True),
        Layout(pipeline=2, distributed_optimizer=True),
    ),
    "no distributed optimizer": (Layout(pipeline=2), Layout(pipeline=2)),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[Any]]:
    """By job, what each of its ranks returned; two ranks are started once, and one is."""
    two: dict[str, Any] = {"movement": (ranks.rates_and_movement, (Layout(pipeline=2),))}
    one: dict[str, Any] = {
        "plain": (ranks.plain_rates, (Layout(),)),
        "negative": (ranks.negative_multiplier, ()),
    }
    for name, (saved, resumed) in RESUMED.items():
        directory = tmp_path_factory.mktemp("saved")
        two[f"saved, {name}"] = ranks.save_and_go_on, (saved, directory)
        (two if resumed.ranks == 2 else one)[f"resumed, {name}"] = ranks.resume, (resumed, directory)
    two["empty groups"] = ranks.steps_of_empty_groups, ()
    two["megatron's own"] = ranks.only_megatrons_own, (Layout(pipeline=2),)
    return {**run_jobs(two, 2), **run_jobs(one, 1)}


def test_without_multipliers_the_schedule_is_nemos(found):
    (rates,) = found["plain"]
    assert rates == pytest.approx([scheduled(step) for step in range(len(rates))], rel=1e-12)


def test_every_group_follows_the_schedule_times_its_multiplier_on_every_rank(found):
    first, second = found["movement"]
    assert first["order"] == second["order"]
    assert first["order"][0] == (1.0, 1.0)  # NeMo logs the first group's rate as lr
    assert any(first["empty"])
    assert any(second["empty"])
    assert {multiplier for multiplier, _ in first["order"]} == {0.0, 0.05, 1.0, 2.0}
    for result in (first, second):
        for step, rates in enumerate(result["rates"]):
            for (multiplier, _), rate in rates.items():
                assert rate == pytest.approx(multiplier * scheduled(step), rel=1e-12)
    moved = {**first["moved"], **second["moved"]}
    for name, distance in moved.items():
        assert (distance == 0.0) == ("embedding" in name), name  # weight decay is 0.5, and 0 stands still


@pytest.mark.parametrize("layouts", RESUMED)
def test_resuming_goes_on_with_the_same_rates(found, layouts):
    losses, rates = found[f"saved, {layouts}"][0]
    for found_losses, found_rates in found[f"resumed, {layouts}"]:
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert found_rates == rates


def test_a_group_that_is_empty_on_a_rank_keeps_its_step(found):
    assert [set(steps) for steps in found["empty groups"]] == [{2}, {2}]


def test_a_negative_multiplier_is_refused(found):
    (message,) = found["negative"]
    assert "is -1.0; it must be finite and not negative" in message


def test_megatrons_own_condition_gives_megatrons_own_groups(found):
    for original, patched in found["megatron's own"]:
        assert patched == original
