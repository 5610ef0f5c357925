"""VIRAL's loss and the gradient of every parameter agree with the oracle in every layout, in all its forms.

The oracle is :mod:`tests.reference.viral` inside :mod:`tests.reference.neva_pre`; tolerances are those of
:mod:`tests.parity.test_parity`. Features of an external target come with the data, as they do from the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_pre.objectives.schedules import ScheduleConfig
from tests.parity import test_laver_parity as with_laver
from tests.parity.job import Job
from tests.parity.layouts import EVERY_LAYOUT, LAYOUTS, on_both
from tests.parity.test_parity import (
    GRADIENT,
    LOSS_LM,
    LOSS_PRE,
    batches,
    disagreements,
    oracle,
    run,
)
from tests.reference import tiny
from tests.reference.neva_laver import LaVerReferenceConfig
from tests.reference.neva_pre import ReferenceConfig
from tests.reference.viral import ViralReference

WEIGHT = 0.4  # no other term's
# The cosines of two matrices differ by float32's rounding, whose square is nothing beside 1e-6.
LOSS_VIRAL = {"direct": dict(abs=LOSS_PRE), "similarity": dict(rel=1e-5, abs=1e-7)}
SEPARATE = ViralReference(layers=(2, 4), weight=WEIGHT, shared_head=False)
ONE_SHARED = ViralReference(layers=(3,), weight=WEIGHT)
SIMILARITY = replace(SEPARATE, form="similarity")
HIDDEN = replace(SIMILARITY, compared="hidden")


def options(viral: ViralReference) -> dict[str, Any]:
    """The product's options for what the oracle computes."""
    return {
        "layers": list(viral.layers),
        "weight": viral.weight,
        "form": viral.form,
        "compared": viral.compared,
        "target": viral.target,
        "shared_head": viral.shared_head,
        "head_depth": viral.head_depth,
        "head_hidden_width": tiny.VIRAL_HEAD,
        "target_features": "with the data" if viral.target == "external" else None,
    }


def with_targets(steps: list[list[list[dict[str, Any]]]]) -> list[list[list[dict[str, Any]]]]:
    numbers = iter(range(10_000))
    return [[[tiny.with_targets(batch, next(numbers)) for batch in rank] for rank in step] for step in steps]


def case(
    layout: str,
    viral: ViralReference,
    pre_layers: tuple[int, ...] = (),
    num_microbatches: int = 4,
    parallel: dict[str, Any] | None = None,
    **shape: Any,
) -> tuple[Job, ReferenceConfig]:
    """The tiny model with VIRAL in ``layout``: the run and its oracle."""
    axes = EVERY_LAYOUT[layout]
    groups = max(tiny.GROUPS, axes.get("tensor", 1))
    config = tiny.tiny_config(pre_layers=pre_layers, num_query_groups=groups, viral=viral)
    job = Job(
        parallel={**axes, **(parallel or {})},
        pre={"layers": list(pre_layers)} if pre_layers else None,
        viral=options(viral),
        steps=with_targets(batches(axes, num_microbatches, **shape)),
        state=tiny.random_state(config),
        language={"num_query_groups": groups},
    )
    return job, config


def check(job: Job, config: ReferenceConfig, weights: Sequence[float] | None = None) -> None:
    """``weights``: of VIRAL at every step, where a schedule moves it."""
    viral = config.viral
    for step, (records, data) in enumerate(zip(run(job), job.steps, strict=True)):
        if weights is not None:
            config = replace(config, viral=replace(viral, weight=weights[step]))
        expected = oracle(job.state, config, data)
        assert records[0].metrics["reduced_train_loss"] == pytest.approx(expected["loss_lm"].item(), rel=LOSS_LM)
        for rank, record in enumerate(records):
            found = record.metrics.get("viral/loss", 0.0)  # text alone logs none
            assert found == pytest.approx(expected["loss_viral"].item(), **LOSS_VIRAL[viral.form]), (step, rank)
            if config.pre_layers:
                assert record.metrics.get("pre/loss", 0.0) == pytest.approx(expected["loss_pre"].item(), abs=LOSS_PRE)
        wrong = disagreements(records, expected)
        assert not wrong, f"step {step}: {wrong}"


@pytest.mark.parametrize("layout", on_both(LAYOUTS))
def test_the_direct_form_with_a_head_for_each_of_two_layers(layout: str) -> None:
    """Where axes multiply the relational form is compared, which has its heads, target, taps and scale, and more."""
    check(*case(layout, SEPARATE))


@pytest.mark.parametrize("layout", on_both(EVERY_LAYOUT))
def test_the_relational_form_with_a_head_for_each_of_two_layers(layout: str) -> None:
    check(*case(layout, SIMILARITY))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_relational_form_of_hidden_states(layout: str) -> None:
    check(*case(layout, HIDDEN))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_head_at_the_middle_layer(layout: str) -> None:
    check(*case(layout, ONE_SHARED))


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2"])
def test_one_head_for_two_layers_of_a_chunk(layout: str) -> None:
    """Layers 3 and 4 are the second stage's; the head's gradient is the sum of both layers'."""
    check(*case(layout, replace(ONE_SHARED, layers=(3, 4), head_depth=2)))


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP4", "PP2-VPP2", "CP2"])
def test_the_models_own_encoder_as_target(layout: str) -> None:
    check(*case(layout, replace(SEPARATE, target="encoder")))


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2", "CP2"])
@pytest.mark.parametrize("viral", [SEPARATE, SIMILARITY], ids=["direct", "similarity"])
def test_visual_tokens_cut_off_by_the_maximum_length_count_nowhere(layout: str, viral: ViralReference) -> None:
    job, config = case(layout, viral, answer=8)
    check(replace(job, max_length=12), replace(config, max_sequence_length=12))


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2", "PP2-VPP2"])
def test_full_recompute_changes_nothing(layout: str) -> None:
    check(*case(layout, SIMILARITY, parallel={"recompute": "full"}))


@pytest.mark.parametrize("layout", ["one-rank", "PP2", "DP2"])
def test_a_mean_of_micro_batch_means_is_the_same_where_all_weigh_the_same(layout: str) -> None:
    """Megatron without calculate_per_token_loss divides by ranks and micro-batches instead of by loss tokens."""
    job, config = case(layout, SIMILARITY)
    for step in job.steps:
        for rank in step:
            for batch in rank:
                mask = batch["loss_mask"]
                mask[:, : mask.shape[1] - 2] = 0
                mask[:, -2:] = 1
    check(replace(job, settings={"calculate_per_token_loss": False}), config)


@pytest.mark.parametrize("layout", ["one-rank", "PP2"])
def test_a_weight_and_its_schedule_scale_the_gradient(layout: str) -> None:
    """From a quarter of 0.4 to all of it in four steps: 0.25, 0.4375 and 0.625 of it in the first three."""
    job, config = case(layout, ONE_SHARED)
    assert job.viral is not None
    viral = {**job.viral, "schedule": ScheduleConfig(kind="linear", start=0.25, steps=4)}
    check(replace(job, viral=viral), config, weights=[0.1, 0.175, 0.25])


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2", "PP2-VPP2", "CP2", "TP2-SP-PP2-CP2-DP2"])
def test_beside_pre(layout: str) -> None:
    """Both send an anchor of their own, to different layers."""
    check(*case(layout, SIMILARITY, pre_layers=(3,)))


@pytest.mark.parametrize("layout", on_both(["one-rank", "TP2-SP", "PP2", "CP2"], ["PP2"]))
def test_beside_pre_and_laver(layout: str) -> None:
    """A rank's hidden states hold LaVer's branch behind the samples."""
    job, config = with_laver.case(layout)
    config = LaVerReferenceConfig(**{**vars(config), "viral": SIMILARITY})
    job = replace(job, viral=options(SIMILARITY), steps=with_targets(job.steps), state=tiny.random_state(config))
    answers = with_laver.check(job, config)
    assert all(torch.isfinite(answer["loss_viral"]) for answer in answers)


@pytest.mark.parametrize("layout", ["one-rank", "PP2", "DP2"])
@pytest.mark.parametrize("viral", [SEPARATE, SIMILARITY], ids=["direct", "similarity"])
def test_a_gradient_wrong_by_a_factor_of_two_is_noticed_in_every_parameter_it_reaches(
    layout: str, viral: ViralReference
) -> None:
    job, config = case(layout, viral)
    expected = oracle(job.state, config, job.steps[0])
    doubled = oracle(job.state, replace(config, viral=replace(viral, weight=2 * WEIGHT)), job.steps[0])
    reached = {name for name, g in expected["grads"].items() if not torch.equal(g, doubled["grads"][name])}
    zero_in_theory = {name for name in reached if name.endswith("k_proj.bias")}
    wrong = disagreements(run(replace(job, gradient_factor=2.0))[0], expected)
    assert len(reached) > 30
    assert wrong.keys() == reached - zero_in_theory
    assert min(wrong.values()) > 10 * GRADIENT
