"""The run that is rehearsed: enough micro-batches, and fewer layers where asked."""

from dataclasses import replace

import pytest

from nemo_pre.checks.run import check_options
from nemo_pre.config.compose import compose_run
from nemo_pre.config.schema import ParallelConfig
from nemo_pre.objectives.registry import enabled
from nemo_pre.planner.chunks import chunks_of_stages, num_chunks
from nemo_pre.planner.schedule import peak
from nemo_pre.rehearsal.batches import special_kinds
from nemo_pre.rehearsal.run import as_matched, as_rehearsed
from nemo_pre.rehearsal.shrink import STEPS, cut_depth, filling_micro_batches, rehearsed_run


def stages_with_targets(config):
    found = []
    for objective in enabled(config):
        for layer in objective.tapped_layers():
            found += [
                (objective.name, stage, number)
                for stage, chunks in enumerate(chunks_of_stages(config))
                for number, chunk in enumerate(chunks)
                if layer - 1 in chunk.layers
            ]
    return found


@pytest.mark.parametrize(
    "name",
    [
        "digits-pre-laver",
        "clip672_qwen25_3b_stage2_frozen_pre",
        "patch_mlp_qwen25_7b_laver_stage2_knowledge",
        "qwen25vl_qwen25_7b_stage2_full_pre",
        "siglip2_qwen25_7b_stage2_full_viral",
        "siglip2_qwen25_72b_laver_stage2_knowledge",
        "siglip2_llama3_70b_stage2_full_pre",
    ],
)
def test_a_cut_recipe_is_a_run_with_its_targets_in_their_chunks(name, monkeypatch):
    monkeypatch.setattr("nemo_pre.checks.run.visible_gpus", lambda: 0)
    config = compose_run([f"experiment={name}"])
    cut = cut_depth(config, num_chunks(config.parallel))
    assert stages_with_targets(cut) == stages_with_targets(config)
    assert cut.model.language.num_layers <= max(num_chunks(config.parallel), 2)
    assert cut.model.vision.num_layers <= max(3, num_chunks(config.parallel))
    run = rehearsed_run(cut, len(special_kinds(cut)))
    check_options(run)
    assert run.trainer.max_steps == STEPS
    assert cut_depth(config, config.model.language.num_layers) == config


def test_target_layers_of_one_chunk_stay_apart_and_uneven_chunks_uneven():
    words = ["experiment=siglip2_qwen25_7b_stage2_full_pre", "objective.pre.layers=[3,4,5,28]", "parallel=pp2"]
    config = compose_run([*words, "cluster=local", "parallel.pipeline_layers=[20,8]"])
    cut = cut_depth(config, 4)
    assert cut.parallel.pipeline_layers == [3, 3]
    assert cut.objective.pre.layers == [1, 2, 3, 6]
    assert cut_depth(config, 14).parallel.pipeline_layers == [10, 4]


def test_whole_groups_of_recomputed_layers_are_left():
    words = ["parallel.recompute=full", "parallel.recompute_num_layers=4", "parallel=pp2", "cluster=local"]
    cut = cut_depth(compose_run(["experiment=llava15_7b_stage2_full", *words]), 2)
    assert [len(chunk.layers) for stage in chunks_of_stages(cut) for chunk in stage] == [4, 4]


@pytest.mark.parametrize("pipeline, virtual, expected", [(1, None, 1), (4, None, 4), (4, 2, 8), (8, 5, 16)])
def test_micro_batches_fill_every_stage_as_any_number_would(pipeline, virtual, expected):
    config = compose_run(["experiment=digits_tiny"])
    config = replace(config, parallel=ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual))
    number, chunks = filling_micro_batches(config), virtual or 1
    assert number == expected
    for stage in range(pipeline):
        held = [peak(stage, pipeline, count, [1.0] * chunks, [0.0] * chunks) for count in (number, 4 * pipeline)]
        assert held[0] == held[1]


@pytest.mark.parametrize(
    "name, micro_batches",
    [("siglip2_qwen25_72b_laver_stage2_knowledge", 8), ("digits_tiny_pre", 3), ("llava15_7b_stage1_align", 2)],
)
def test_calls_of_an_interleaved_pipeline_are_matched_over_one_round_of_micro_batches(name, micro_batches):
    """Others with as many as their memory is measured with."""
    config = compose_run([f"experiment={name}"])
    run, whole = as_matched(config), as_rehearsed(config, num_chunks(config.parallel))
    per_micro_batch = run.trainer.micro_batch_size * run.parallel.data
    assert run.trainer.global_batch_size == micro_batches * per_micro_batch <= whole.trainer.global_batch_size
    assert (run == whole) is (run.parallel.virtual_pipeline is None)
    assert run.model.language.num_layers == num_chunks(config.parallel)
