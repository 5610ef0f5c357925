"""Every layout of the CPU backend gives one rank's loss, gradients and next steps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compat import layout_ranks
from tests.compat.jobs import run_jobs
from tests.compat.tiny_gpt import Layout
from tests.ranks.sharded import assemble

# float64: the order of a few thousand terms is all that may differ; a gradient is held against its tensor's largest.
LOSS_64, GRADIENT_64 = 1e-14, 1e-12
# float32, after up to two Adam steps, whose division by the root of the second moment amplifies rounding.
LOSS_32 = 4e-5

LAYOUTS = {
    "tensor=2": Layout(tensor=2),
    "tensor=2 sequence": Layout(tensor=2, sequence=True),
    "pipeline=2": Layout(pipeline=2),
    "pipeline=2 virtual=2": Layout(pipeline=2, virtual=2),
    "context=2": Layout(context=2),
    "data=2": Layout(data=2),
    "data=2 distributed_optimizer": Layout(data=2, distributed_optimizer=True),
    "data=2 distributed_optimizer overlap": Layout(data=2, distributed_optimizer=True, overlap=True),
    "tensor=2 pipeline=2 sequence distributed_optimizer": Layout(
        tensor=2, pipeline=2, sequence=True, distributed_optimizer=True
    ),
    "tensor=2 context=2 sequence": Layout(tensor=2, context=2, sequence=True),
}
RECOMPUTE = {
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full-uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full-block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}
LAYER_NORM = {"normalization": "LayerNorm"}
BF16 = {
    "1 rank": Layout(precision="bf16"),
    "tensor=2 context=2 sequence": Layout(tensor=2, context=2, sequence=True, precision="bf16"),
    "pipeline=2 data=2 distributed optimizer": Layout(
        pipeline=2, data=2, distributed_optimizer=True, precision="bf16"
    ),
}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """What every rank of every layout found, by the layout's name; one start of the ranks for each number of them."""
    models = {"1 rank": Layout(), "1 rank LayerNorm": Layout(model=LAYER_NORM)}
    drawn = run_jobs({name: (layout_ranks.first_weights, (layout,)) for name, layout in models.items()}, 1)
    weights, layer_norm = (drawn[name][0] for name in models)
    assert "decoder.final_layernorm.bias" in layer_norm

    jobs = {"1 rank": (Layout(), weights), "1 rank LayerNorm": (models["1 rank LayerNorm"], layer_norm)}
    jobs |= {name: (layout, weights) for name, layout in LAYOUTS.items()}
    for name, recompute in RECOMPUTE.items():
        jobs[name] = Layout(tensor=2, sequence=True, model=recompute), weights
    jobs["LayerNorm"] = Layout(tensor=2, sequence=True, model=LAYER_NORM), layer_norm
    asked = {name: (layout_ranks.both, job) for name, job in jobs.items()}
    asked |= {f"bf16 {name}": (layout_ranks.losses_of_steps, (layout, weights)) for name, layout in BF16.items()}
    found: dict[str, Any] = {}
    for ranks in (1, 2, 4):
        of_so_many = {name: job for name, job in asked.items() if job[1][0].ranks == ranks}
        found |= run_jobs(of_so_many, ranks)
    return found


def check(one_rank, results):
    loss, gradients, losses = one_rank
    expected = assemble([gradients])
    found = assemble([shards for _, shards, _ in results], replica_tolerance=GRADIENT_64)
    assert found.keys() == expected.keys()
    for rank_loss, _, rank_losses in results:
        assert rank_loss == pytest.approx(loss, rel=LOSS_64)
        assert rank_losses == pytest.approx(losses, rel=LOSS_32)
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, f"{name} has no gradient: nothing is compared"
        assert (found[name] - gradient).abs().max() <= GRADIENT_64 * scale, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_rank(trained, layout):
    check(trained["1 rank"][0], trained[layout])


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputation_changes_nothing(trained, recompute):
    check(trained["1 rank"][0], trained[recompute])


def test_layer_norm_under_sequence_parallelism_equals_one_rank(trained):
    check(trained["1 rank LayerNorm"][0], trained["LayerNorm"])


@pytest.mark.parametrize("layout", BF16)
def test_bf16_follows_float32(trained, layout):
    # bf16 has 8 bits: 0.4% per rounding of an activation, averaged over 180 targets.
    expected = trained["1 rank"][0][2]
    for losses in trained[f"bf16 {layout}"]:
        assert losses == pytest.approx(expected, rel=1e-3)
        assert losses != expected
