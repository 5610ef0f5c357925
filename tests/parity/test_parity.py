"""L_LM, L_PRe and the gradient of every parameter agree with the oracle in every layout.

The oracle (:mod:`tests.reference.neva_pre`) computes in float64, one sample at a time; the product computes in
float32 on gloo ranks. Tolerances, all relative to what is compared:

- a parameter's gradient: |g - g_oracle| <= 2e-5 |g_oracle| + 1e-8 |all gradients| in the 2-norm. Float32 rounds to
  6e-8; through six layers and sums over some hundred tokens at most 5e-6 was seen. The second term is for gradients
  that are exactly zero in theory (the bias of the tower's keys does not change a softmax) and noise in practice.
- L_LM to 1e-6 relative, L_PRe to 5e-7 absolute (a cosine).
- copies of a parameter's gradient on different ranks: bit-identical.

That this is tight enough is tested too: an auxiliary gradient wrong by a factor of two is noticed in every single
parameter it reaches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.parity.job import Job, StepRecord, train
from tests.ranks import run_ranks
from tests.ranks.sharded import assemble
from tests.reference import tiny
from tests.reference.neva_pre import ReferenceConfig, reference_step

GRADIENT, NOISE, LOSS_LM, LOSS_PRE = 2e-5, 1e-8, 1e-6, 5e-7

LAYOUTS: dict[str, dict[str, Any]] = {
    "one-rank": {},
    "TP2": {"tensor": 2},
    "TP2-SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP4": {"pipeline": 4},
    "PP2-VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "DP2": {"data": 2},
    "DP2-sharded-optimizer": {"data": 2, "distributed_optimizer": True},
    "TP2-PP2-SP": {"tensor": 2, "pipeline": 2, "sequence": True},
}

# Images per sample, by micro-batch. The first has a micro-batch of text among others, the second is text alone; a
# data-parallel rank starts one further than its neighbour, so that one rank is all text while another is not.
IMAGES = [
    [(2, 3), (0, 0), (0, 1), (1, 2)],
    [(0, 0), (0, 0), (0, 0), (0, 0)],
    [(0, 1), (3, 0), (1, 1), (0, 0)],
]


def batches(layout: dict[str, Any], num_microbatches: int, **shape: Any) -> list[list[list[dict[str, Any]]]]:
    """Three steps of data for ``layout``: one per entry of IMAGES."""
    ranks = range(layout.get("data", 1))
    return [
        [
            [
                tiny.random_batch(IMAGES[(step + rank) % 3][m], seed=100 * step + 10 * rank + m, **shape)
                for m in range(num_microbatches)
            ]
            for rank in ranks
        ]
        for step in range(3)
    ]


def run(job: Job) -> list[list[StepRecord]]:
    """What every rank recorded, step by step."""
    return [list(ranks) for ranks in zip(*run_ranks(train, job.world_size, job, timeout=150), strict=True)]


def disagreements(step: list[StepRecord], expected: dict[str, Any], tolerance: float = GRADIENT) -> dict[str, float]:
    """Parameters whose gradient is not the oracle's, and by how much relative to its norm."""
    found = assemble([rank.gradients for rank in step])
    assert found.keys() <= expected["grads"].keys()
    total = torch.stack([g.norm() for g in expected["grads"].values()]).norm()
    wrong = {}
    for name, reference in expected["grads"].items():
        if name not in found:  # frozen: no gradient may be lost by it
            assert not reference.any(), f"{name} has a gradient but is frozen"
            continue
        error = (found[name].double() - reference.double()).norm()
        if not error <= tolerance * reference.norm() + NOISE * total:  # also where it is not a number
            wrong[name] = (error / reference.norm()).item()
    return wrong


def check(job: Job, config: ReferenceConfig) -> None:
    for step, (records, data) in enumerate(zip(run(job), job.steps, strict=True)):
        expected = reference_step(job.state, config, [batch for rank in data for batch in rank])
        loss_lm = records[0].metrics["reduced_train_loss"]
        assert loss_lm == pytest.approx(expected["loss_lm"].item(), rel=LOSS_LM), f"L_LM of step {step}"
        for rank, record in enumerate(records if config.pre_layers else []):
            loss_pre = record.metrics["pre/loss"]
            assert loss_pre == pytest.approx(expected["loss_pre"].item(), abs=LOSS_PRE), f"step {step}, rank {rank}"
        wrong = disagreements(records, expected)
        assert not wrong, f"step {step}: {wrong}"


def case(
    layout: str,
    layers: tuple[int, ...] = (2,),
    num_microbatches: int = 4,
    parallel: dict[str, Any] | None = None,
    pre: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Job, ReferenceConfig]:
    """The tiny model with PRe on ``layers`` in ``layout``: the run and its oracle."""
    pre = pre or {}
    oracle = {f"pre_{key}": value for key, value in pre.items() if key in ("variant", "anchor")}
    config = tiny.tiny_config(pre_layers=layers, **oracle)
    job = Job(
        parallel={**LAYOUTS[layout], **(parallel or {})},
        pre={"layers": list(layers), **pre} if layers else None,
        steps=batches(LAYOUTS[layout], num_microbatches),
        state=tiny.random_state(config),
    )
    return replace(job, **changes), config


@pytest.mark.parametrize("layers", [(1,), (3,), (4,), (2, 4)], ids=["first", "middle", "last", "two"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_of_four_uneven_micro_batches(layout, layers):
    check(*case(layout, layers))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "PP2-VPP2"])  # needs a multiple of PP
def test_losses_and_gradients_of_one_micro_batch(layout):
    check(*case(layout, num_microbatches=1))


@pytest.mark.parametrize("layout", ["one-rank", "PP2", "DP2"])
def test_without_pre_the_run_is_plain_neva(layout):
    check(*case(layout, layers=()))


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2", "PP2-VPP2"])
def test_activation_recompute_changes_nothing(layout, recompute):
    check(*case(layout, (1, 3), parallel={"recompute": recompute}))


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded-optimizer"])
def test_gradient_reduction_overlapped_with_the_backward_pass_changes_nothing(sharded):
    check(*case("DP2", (3,), parallel={"overlap_grad_reduce": True, "distributed_optimizer": sharded}))


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2", "CP2", "DP2"])
def test_the_global_variant_pools_each_image_over_the_ranks_that_hold_it(layout):
    check(*case(layout, (3,), pre={"variant": "global"}))


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP4", "PP2-VPP2"])
def test_the_anchor_before_the_projector_has_another_width(layout):
    check(*case(layout, (3,), pre={"anchor": "pre_projector"}))


@pytest.mark.parametrize("layout", ["one-rank", "TP2", "PP2"])
def test_qwen2_with_tied_embeddings_and_a_head_with_norm(layout):
    job, config = case(layout, (3,), pre={"head_norm": True})
    config = replace(config, tie_embeddings=True)
    state = tiny.random_state(config, qkv_bias=True, head_norm=True)
    check(replace(job, state=state, language={"family": "qwen2", "tie_embeddings": True}), config)


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2", "CP2"])
def test_visual_tokens_cut_off_by_the_maximum_length_count_nowhere(layout):
    """Up to 21 positions cut at 12, inside images and between them; the loss counts all text that is left."""
    job, config = case(layout, (3,))
    steps = batches(LAYOUTS[layout], 4, answer=8)
    check(replace(job, steps=steps, max_length=12), replace(config, max_sequence_length=12))


@pytest.mark.parametrize("layout", ["one-rank", "PP2", "CP2", "DP2"])
def test_a_mean_of_micro_batch_means_is_the_same_where_all_weigh_the_same(layout):
    """Megatron without calculate_per_token_loss; PRe's counts still differ between micro-batches and ranks."""
    job, config = case(layout, (3,))
    for step in job.steps:
        for rank in step:
            for batch in rank:
                mask = batch["loss_mask"]
                mask[:, : mask.shape[1] - 2] = 0
                mask[:, -2:] = 1
                assert (batch["labels"][:, -2:] >= 0).all()
    check(replace(job, settings={"calculate_per_token_loss": False}), config)


@pytest.mark.parametrize("layout", ["one-rank", "PP2", "DP2"])
def test_an_auxiliary_gradient_wrong_by_a_factor_of_two_is_noticed_in_every_parameter_it_reaches(layout):
    job, config = case(layout, (3,))
    data = [batch for rank in job.steps[0] for batch in rank]
    expected = reference_step(job.state, config, data)
    doubled = reference_step(job.state, replace(config, pre_weight=2 * config.pre_weight), data)
    reached = {name for name, g in expected["grads"].items() if not torch.equal(g, doubled["grads"][name])}
    zero_in_theory = {name for name in reached if name.endswith("k_proj.bias")}
    wrong = disagreements(run(replace(job, pre_gradient_factor=2.0))[0], expected)
    assert len(reached) > 30
    assert wrong.keys() == reached - zero_in_theory
    assert min(wrong.values()) > 100 * GRADIENT


def test_algorithm_1_taken_literally_fails():
    """The supplement's Algorithm 1 writes the target layer itself as anchor; the product does not do that."""
    job, config = case("PP2", (3,))
    records = run(job)[0]
    literal = reference_step(job.state, replace(config, literal_algorithm_1=True), job.steps[0][0])
    assert abs(records[0].metrics["pre/loss"] - literal["loss_pre"].item()) > 1e-2
    assert disagreements(records, literal, tolerance=1e-2)


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2", "DP2-sharded-optimizer"])
def test_bf16_agrees_to_its_precision(layout):
    """bf16 keeps 8 bits: 0.4% per rounding, a few per cent after six layers forth and back.

    The oracle gets the weights as bf16 rounds them. Losses to 1%, gradients to 10% of their norm, as one vector
    over all parameters to 3%.
    """
    job, config = case(layout, (3,), precision="bf16")
    state = {name: weight.bfloat16().float() for name, weight in job.state.items()}
    for records, data in zip(run(job), job.steps, strict=True):
        expected = reference_step(state, config, [batch for rank in data for batch in rank])
        assert records[0].metrics["reduced_train_loss"] == pytest.approx(expected["loss_lm"].item(), rel=1e-2)
        assert records[0].metrics["pre/loss"] == pytest.approx(expected["loss_pre"].item(), abs=1e-2)
        found = assemble([rank.gradients for rank in records])
        errors = {name: (g.double() - expected["grads"][name]).norm() for name, g in found.items()}
        norms = {name: expected["grads"][name].norm() for name in found}
        total = torch.stack(list(norms.values())).norm()
        assert torch.stack(list(errors.values())).norm() < 3e-2 * total
        wrong = {name: (e / norms[name]).item() for name, e in errors.items() if e > 0.1 * norms[name] + 1e-3 * total}
        assert not wrong
