"""Sums that replicas share out are those of one process that sees every picture."""

from __future__ import annotations

import pytest
import torch

from tests.diagnostics.replica_ranks import DATA, WIDTH, measured_alone, measured_together
from tests.ranks import run_on_standing_ranks


@pytest.mark.parametrize("pictures, fit", [(7, 11), (2, 11), (7, 2)], ids=["shared", "a rank too many", "few to fit"])
def test_replicas_together_measure_what_one_process_does(pictures, fit):
    alone = measured_alone(pictures, fit)
    for of_rank in run_on_standing_ranks(measured_together, 3, pictures, fit):
        assert of_rank.keys() == alone.keys()
        assert of_rank == pytest.approx(alone, rel=1e-9, abs=1e-9)


def test_the_data_of_these_tests_would_show_a_picture_left_out():
    assert measured_alone(7, 11) != pytest.approx(measured_alone(6, 11), rel=1e-6)
    assert measured_alone(7, 11) != pytest.approx(measured_alone(7, 10), rel=1e-6)
    assert DATA.shape[-1] == WIDTH and torch.isfinite(DATA).all()
