"""A learning rate per module: applied once, at every step, on every rank, after a resume, and 0 means 0."""

from __future__ import annotations

import math

import pytest

from tests.compat import learning_rate_ranks as ranks
from tests.compat.tiny_gpt import Layout
from tests.ranks import run_ranks


def scheduled(step):
    """The unscaled rate of NeMo's CosineAnnealing, by hand."""
    if step <= ranks.WARMUP:
        return ranks.BASE * (step + 1) / (ranks.WARMUP + 1)
    if step > ranks.STEPS:
        return ranks.FLOOR
    progress = (step - ranks.WARMUP) / (ranks.STEPS - ranks.WARMUP)
    return ranks.FLOOR + (ranks.BASE - ranks.FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


def test_without_multipliers_the_schedule_is_nemos():
    (rates,) = run_ranks(ranks.plain_rates, 1, Layout())
    assert rates == pytest.approx([scheduled(step) for step in range(len(rates))], rel=1e-12)


def test_every_group_follows_the_schedule_times_its_multiplier_on_every_rank():
    results = run_ranks(ranks.rates_and_movement, 2, Layout(pipeline=2))
    first, second = results
    assert first["order"] == second["order"]
    assert first["order"][0] == (1.0, 1.0)  # NeMo logs the first group's rate as lr
    assert any(first["empty"])
    assert any(second["empty"])
    assert {multiplier for multiplier, _ in first["order"]} == {0.0, 0.05, 1.0, 2.0}
    for result in results:
        for step, rates in enumerate(result["rates"]):
            for (multiplier, _), rate in rates.items():
                assert rate == pytest.approx(multiplier * scheduled(step), rel=1e-12)
    moved = {**first["moved"], **second["moved"]}
    for name, distance in moved.items():
        assert (distance == 0.0) == ("embedding" in name), name  # weight decay is 0.5, and 0 stands still


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (Layout(pipeline=2, distributed_optimizer=True), Layout(distributed_optimizer=True)),
        (Layout(tensor=2, distributed_optimizer=True), Layout(pipeline=2, distributed_optimizer=True)),
        (Layout(pipeline=2), Layout(pipeline=2)),
    ],
    ids=["pipeline=2 to 1 rank", "tensor=2 to pipeline=2", "no distributed optimizer"],
)
def test_resuming_goes_on_with_the_same_rates(tmp_path, saved, resumed):
    losses, rates = run_ranks(ranks.save_and_go_on, saved.ranks, saved, tmp_path)[0]
    for found_losses, found_rates in run_ranks(ranks.resume, resumed.ranks, resumed, tmp_path):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert found_rates == rates


def test_a_group_that_is_empty_on_a_rank_keeps_its_step():
    assert [set(steps) for steps in run_ranks(ranks.steps_of_empty_groups, 2)] == [{2}, {2}]


def test_a_negative_multiplier_is_refused():
    (message,) = run_ranks(ranks.negative_multiplier, 1)
    assert "is -1.0; it must be finite and not negative" in message


def test_megatrons_own_condition_gives_megatrons_own_groups():
    for original, patched in run_ranks(ranks.only_megatrons_own, 2, Layout(pipeline=2)):
        assert patched == original
