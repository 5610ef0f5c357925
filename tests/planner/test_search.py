"""The layout search: what it returns fits, uses every GPU, and is the fastest of what fits."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from nemo_pre.checks.run import check_options
from nemo_pre.config.compose import compose_run
from nemo_pre.config.derived import world_size
from nemo_pre.config.schema import ClusterConfig
from nemo_pre.planner.devices import DEVICES, Efficiency
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.memory import fullest_rank, rank_memory
from nemo_pre.planner.search import indivisible, search
from nemo_pre.planner.step_time import step_time
from tests.planner.shapes import llama3_70b, qwen25_72b

H100, ASSUMED = DEVICES["h100"], Efficiency()


@pytest.fixture(scope="module")
def found_for_70b():
    started = time.process_time()
    found = search(llama3_70b(), 512, H100, ASSUMED, check_options)
    return found, time.process_time() - started


def test_a_70b_model_on_512_gpus_is_searched_within_10_seconds(found_for_70b) -> None:
    found, seconds = found_for_70b
    assert len(found.best) == 5 and seconds < 10


def test_every_layout_found_uses_all_gpus_and_fits_on_every_stage(found_for_70b) -> None:
    for candidate in found_for_70b[0].best:
        config = candidate.config
        assert world_size(config.parallel) == 512 and indivisible(config) is None
        load = largest_load(config)
        for stage in range(config.parallel.pipeline):
            needed = rank_memory(config, load, stage, fused=True).total
            assert needed <= candidate.memory <= H100.memory * ASSUMED.memory


def test_the_fastest_comes_first_and_no_neighbour_that_fits_is_faster(found_for_70b) -> None:
    found = found_for_70b[0]
    times = [candidate.time.seconds for candidate in found.best]
    assert times == sorted(times)
    best = found.best[0].config
    layout, slower = best.parallel, 0
    for tensor, pipeline in ((layout.tensor * 2, layout.pipeline // 2), (layout.tensor, layout.pipeline * 2)):
        data = 512 // (tensor * pipeline * layout.context)
        other = replace(
            best,
            parallel=replace(
                layout, tensor=tensor, pipeline=pipeline, virtual_pipeline=None, pipeline_layers=None, data=data
            ),
        )
        if indivisible(other) is None:
            slower += step_time(other, largest_load(other), H100, ASSUMED).seconds >= times[0]
    assert slower >= 1


def test_what_train_refuses_is_not_among_the_best() -> None:
    """Five bf16 layers at each end must lie on the first and last stage: eight stages of 28 layers are too short."""
    words = ["precision=fp8_tensorwise", "precision.bf16_layers=5"]
    found = search(
        compose_run(["experiment=siglip2_qwen25_7b_stage2_full", *words]), 64, H100, ASSUMED, check_options, best=1000
    )
    assert len(found.best) == found.fitting and found.refused["refused by nemo-pre train"].number
    for candidate in found.best:
        check_options(replace(candidate.config, cluster=ClusterConfig(), platform="gpu", dry_run=True))


def test_it_says_why_others_fail(found_for_70b) -> None:
    refused = found_for_70b[0].refused
    assert all(kind.number and kind.nearest for kind in refused.values())
    assert "does not fit by" in refused["weights, gradients and optimizer alone do not fit"].nearest
    assert sum(kind.number for kind in refused.values()) + found_for_70b[0].fitting > 400


def test_nothing_fits_where_the_weights_alone_do_not() -> None:
    found = search(qwen25_72b(), 8, H100, ASSUMED, check_options)
    assert not found.best and not found.fitting
    assert "weights, gradients and optimizer alone do not fit" in found.refused


def test_tensor_parallelism_stops_at_the_query_groups() -> None:
    config = compose_run(["experiment=siglip2_qwen25_7b_stage2_full"])
    found = search(config, 64, H100, ASSUMED, check_options)
    assert found.best and all(candidate.config.parallel.tensor <= 4 for candidate in found.best)
    config.parallel = replace(config.parallel, tensor=8, data=1)
    assert indivisible(config) == "TP8 does not divide 28 attention heads"


def test_recomputation_is_taken_only_where_it_is_needed() -> None:
    config, small = compose_run(["experiment=llava15_7b_stage2_full"]), replace(H100, memory=32e9)
    found = search(config, 8, small, ASSUMED, check_options, best=1000)
    recomputing = [c.config for c in found.best if c.config.parallel.recompute != "none"]
    assert recomputing
    for needy in recomputing:
        without = replace(needy, parallel=replace(needy.parallel, recompute="none"))
        assert fullest_rank(without, largest_load(without), fused=True)[1].total > small.memory * ASSUMED.memory
    roomy = search(config, 8, DEVICES["b200"], ASSUMED, check_options)
    assert {candidate.config.parallel.recompute for candidate in roomy.best} == {"none"}
