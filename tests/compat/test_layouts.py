"""Every layout of the CPU backend gives one rank's loss, gradients and next steps."""

from __future__ import annotations

import pytest

from tests.compat import layout_ranks
from tests.compat.tiny_gpt import Layout
from tests.ranks import run_ranks
from tests.ranks.sharded import assemble

# float64: the order of a few thousand terms is all that may differ; a gradient is held against its tensor's largest.
LOSS_64, GRADIENT_64 = 1e-14, 1e-12
# float32, after up to two Adam steps, whose division by the root of the second moment amplifies rounding.
LOSS_32 = 4e-5


@pytest.fixture(scope="module")
def weights():
    return assemble(run_ranks(layout_ranks.first_weights, 1, Layout()))


@pytest.fixture(scope="module")
def one_rank(weights):
    return run_ranks(layout_ranks.both, 1, Layout(), weights)[0]


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


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2),
        Layout(tensor=2, sequence=True),
        Layout(pipeline=2),
        Layout(pipeline=2, virtual=2),
        Layout(context=2),
        Layout(data=2),
        Layout(data=2, distributed_optimizer=True),
        Layout(data=2, distributed_optimizer=True, overlap=True),
        Layout(tensor=2, pipeline=2, sequence=True, distributed_optimizer=True),
        Layout(tensor=2, context=2, sequence=True),
    ],
    ids=lambda layout: " ".join(f"{k}={v}" for k, v in vars(layout).items() if v != getattr(Layout(), k)),
)
def test_layout_equals_one_rank(weights, one_rank, layout):
    check(one_rank, run_ranks(layout_ranks.both, layout.ranks, layout, weights))


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    ],
    ids=["selective", "full-uniform", "full-block"],
)
def test_recomputation_changes_nothing(weights, one_rank, recompute):
    layout = Layout(tensor=2, sequence=True, model=recompute)
    check(one_rank, run_ranks(layout_ranks.both, layout.ranks, layout, weights))


def test_layer_norm_under_sequence_parallelism_equals_one_rank():
    model = {"normalization": "LayerNorm"}
    weights = assemble(run_ranks(layout_ranks.first_weights, 1, Layout(model=model)))
    one_rank = run_ranks(layout_ranks.both, 1, Layout(model=model), weights)[0]
    assert "decoder.final_layernorm.bias" in weights
    layout = Layout(tensor=2, sequence=True, model=model)
    check(one_rank, run_ranks(layout_ranks.both, layout.ranks, layout, weights))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(precision="bf16"),
        Layout(tensor=2, context=2, sequence=True, precision="bf16"),
        Layout(pipeline=2, data=2, distributed_optimizer=True, precision="bf16"),
    ],
    ids=["1 rank", "tensor=2 context=2 sequence", "pipeline=2 data=2 distributed optimizer"],
)
def test_bf16_follows_float32(weights, one_rank, layout):
    # bf16 has 8 bits: 0.4% per rounding of an activation, averaged over 180 targets.
    for losses in run_ranks(layout_ranks.losses_of_steps, layout.ranks, layout, weights):
        assert losses == pytest.approx(one_rank[2], rel=1e-3)
        assert losses != one_rank[2]
