"""A gradient that is NaN or infinite on any rank ends the step on all of them, and no weight has moved."""

from __future__ import annotations

import math

import pytest

from tests.compat.jobs import run_jobs
from tests.compat.tiny_gpt import Layout
from tests.optim.finite_ranks import spoilt_step

SHARDED = Layout(data=2, distributed_optimizer=True, overlap=True, precision="bf16")
# Of a distributed optimizer each rank has a part of every bucket of gradients, whichever parameters lie there.
ALL = ""
CASES = {
    "a weight of every rank's own": (Layout(tensor=2), "self_attention.linear_qkv.weight", 1, math.nan),
    "a copy that no norm counts": (Layout(tensor=2), "final_layernorm.weight", 1, math.nan),
    "infinite": (Layout(tensor=2), "final_layernorm.weight", 0, -math.inf),
    "a stage": (Layout(pipeline=2), "output_layer.weight", 1, math.nan),
    "a part of a distributed optimizer": (SHARDED, ALL, 0, math.nan),
    "the other rank's part": (SHARDED, ALL, 1, math.inf),
    "a finite one": (SHARDED, ALL, 0, 0.5),
}


@pytest.fixture(scope="module")
def steps():
    return run_jobs({name: (spoilt_step, case) for name, case in CASES.items()}, 2)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_stops_before_a_weight_moves_and_only_where_a_gradient_is_not_finite(steps, name):
    spoils = name != "a finite one"
    assert any(found["found"] for found in steps[name])
    for found in steps[name]:
        assert (found["raised"] is not None) == spoils
        assert found["kept"] == spoils
        assert found["trains again"], "nothing of it is left for the next step"
