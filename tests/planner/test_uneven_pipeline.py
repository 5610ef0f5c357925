"""``parallel.pipeline_layers``: uneven stages train the same model, and the planner's split is the best one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_pre.checks.run import check_options
from nemo_pre.config.compose import compose_run
from nemo_pre.config.run import RunConfig
from nemo_pre.huggingface.exporter import export_checkpoint
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.planner.balance import balanced
from nemo_pre.planner.devices import DEVICES, Efficiency
from nemo_pre.planner.flops import model_flops
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.memory import rank_memory
from nemo_pre.planner.parameters import rank_parameters
from nemo_pre.planner.step_time import step_time
from nemo_pre.planner.vision import tower_parameters
from tests.huggingface.test_round_trip import same_bits, tensors_of
from tests.huggingface.tiny import tiny_llava
from tests.parity import test_laver_parity
from tests.parity.test_parity import case, check
from tests.planner.shapes import qwen25_72b
from tests.planner.uneven_ranks import save_again
from tests.ranks import run_on_standing_ranks
from tests.reference import tiny

H100, ASSUMED = DEVICES["h100"], Efficiency()


@pytest.mark.parametrize("layers", [[1, 3], [3, 1]], ids=str)
def test_losses_and_gradients_are_the_oracles_where_the_first_stage_is_short_or_long(layers: list[int]) -> None:
    """PRe on both sides of the cut: layer 2 is on the second stage of [1, 3] and on the first of [3, 1]."""
    check(*case("PP2", (2, 4), parallel={"pipeline_layers": layers}))


def test_losses_and_gradients_are_the_oracles_where_chunks_are_interleaved_and_uneven() -> None:
    config = tiny.tiny_config(pre_layers=(3, 5), num_layers=6)
    job, _ = case("PP2-VPP2", (3, 5), parallel={"pipeline_layers": [1, 2, 2, 1]}, language={"num_layers": 6})
    check(replace(job, state=tiny.random_state(config)), config)


def test_lavers_losses_and_gradients_are_the_oracles_where_the_first_stage_is_short() -> None:
    job, config = test_laver_parity.case("PP2")
    test_laver_parity.check(replace(job, parallel={**job.parallel, "pipeline_layers": [1, 3]}), config)


def test_a_checkpoint_goes_through_an_uneven_pipeline_bit_for_bit(tmp_path: Path) -> None:
    original = tiny_llava(tmp_path / "hf", language="llama", vision="clip")
    import_checkpoint(str(original), str(tmp_path / "checkpoint"))
    held = run_on_standing_ranks(save_again, 2, str(tmp_path / "checkpoint"), [1, 3], str(tmp_path / "saved"))
    assert held == [[1], [2, 3, 4]]
    export_checkpoint(str(tmp_path / "saved"), str(tmp_path / "back"))
    same_bits(tensors_of(tmp_path / "back"), tensors_of(original))


@pytest.mark.parametrize("parallel", [{"pipeline": 4}, {"pipeline": 2, "virtual_pipeline": 2}], ids=str)
def test_no_split_of_a_small_model_has_a_less_busy_stage(parallel: dict[str, int]) -> None:
    """Qwen2.5-7B's output layer costs more than two decoder layers."""
    run = compose_run(["experiment=siglip2_qwen25_7b_stage2_full"])
    run.parallel = replace(run.parallel, tensor=1, sequence=False, data=2, **parallel)
    run.model.language = replace(run.model.language, num_layers=12)
    load = largest_load(run)

    def busiest(split: tuple[int, ...] | list[int] | None) -> float:
        layout = replace(run.parallel, pipeline_layers=None if split is None else list(split))
        return max(step_time(replace(run, parallel=layout), load, H100, ASSUMED).stages)

    every = [split for split in itertools.product(range(1, 10), repeat=4) if sum(split) == 12]
    best = min(map(busiest, every))
    found = balanced(run, load, H100, ASSUMED).parallel.pipeline_layers
    assert found is not None and busiest(found) == pytest.approx(best, rel=1e-9) and best < 0.99 * busiest(None)


def test_a_balanced_pipeline_is_faster_and_one_that_train_accepts() -> None:
    """The trained tower, whole on every tensor-parallel rank, and the output layer each cost several layers."""
    run = compose_run(["experiment=siglip2_qwen25_7b_stage2_full", "cluster=local"])
    run.parallel = replace(run.parallel, tensor=4, sequence=True, pipeline=4, data=1)
    load = largest_load(run)
    found = balanced(run, load, H100, ASSUMED)
    layers = found.parallel.pipeline_layers
    assert layers is not None and layers[0] < layers[1] and layers[-1] < layers[1] and sum(layers) == 28
    assert step_time(found, load, H100, ASSUMED).seconds < step_time(run, load, H100, ASSUMED).seconds
    check_options(found)


def test_features_take_the_tower_off_the_first_stage_which_then_holds_more_layers() -> None:
    """2,304 patches through a frozen CLIP beside a 3B model, which read from a disk cost nothing."""
    run = compose_run(["experiment=clip672_qwen25_3b_stage2_frozen_pre", "cluster=local"])
    run.parallel = replace(run.parallel, tensor=2, sequence=True, pipeline=4, data=1)
    cached = replace(run, data=replace(run.data, features="features"))
    load = largest_load(run)
    dealt_out, cached_dealt_out = (balanced(each, load, H100, ASSUMED) for each in (run, cached))
    split, cached_split = dealt_out.parallel.pipeline_layers, cached_dealt_out.parallel.pipeline_layers
    assert split is not None and cached_split is not None and cached_split[0] > split[0]
    seconds = [step_time(each, load, H100, ASSUMED).seconds for each in (dealt_out, cached_dealt_out)]
    assert seconds[1] < 0.97 * seconds[0]
    assert {part: flops for part, flops in model_flops(run, load).items() if part != "vision"} == model_flops(
        cached, load
    )
    tower = tower_parameters(run.model.vision)
    assert sum(rank_parameters(run, 0).values()) - sum(rank_parameters(cached, 0).values()) == tower > 3e8
    weights = [rank_memory(each, load, 0, fused=True).by_kind["weights"] for each in (run, cached)]
    assert weights[0] - weights[1] == 2 * tower
    assert rank_parameters(run, 1) == rank_parameters(cached, 1)


def test_an_even_split_is_kept_where_it_is_as_good() -> None:
    run = qwen25_72b(tensor=8, pipeline=2, data=8)
    assert balanced(run, largest_load(run), H100, ASSUMED).parallel.pipeline_layers is None


def test_layers_that_the_stages_do_not_divide_can_be_dealt_out_all_the_same() -> None:
    run: RunConfig = qwen25_72b(tensor=8, pipeline=12, data=1)
    layers = balanced(run, largest_load(run), H100, ASSUMED).parallel.pipeline_layers
    assert layers is not None and len(layers) == 12 and sum(layers) == 80
