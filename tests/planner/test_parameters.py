"""Parameters against the published architectures, and of stages against the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import recipes
from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.registry import enabled
from nemo_pre.planner.chunks import Chunk, chunks_of_stages
from nemo_pre.planner.memory import stages_that_differ
from nemo_pre.planner.parameters import (
    LANGUAGE,
    layer_parameters,
    model_parameters,
    rank_parameters,
)
from tests.composed import experiment
from tests.planner.built import parameters_of_stages
from tests.planner.shapes import llama3_70b, qwen25_72b, tiny
from tests.ranks import run_on_standing_ranks

LARGE = {"llama3_70b": llama3_70b, "qwen25_72b": qwen25_72b}


def config_named(name: str) -> RunConfig:
    return LARGE[name]() if name in LARGE else experiment(name)


def one_recipe_for_each(*distinguish: Callable[[RunConfig], object]) -> list[str]:
    """The last of those recipes that do not differ in what ``distinguish`` says."""
    return list(
        {
            tuple(str(of(config_named(name))) for of in distinguish): name for name in recipes.choices("experiment")
        }.values()
    )


def model_name(config: RunConfig) -> str:
    return config.model.name


@pytest.mark.parametrize("name", [*one_recipe_for_each(model_name), *LARGE])
def test_language_model_vision_tower_and_projector_are_those_of_hugging_face(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    from nemo_pre.neva.vision import VisionTowerConfig

    config = config_named(name)
    language, vision = config.model.language, config.model.vision
    language_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[language.family]
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(
            language_class(
                num_hidden_layers=language.num_layers,
                hidden_size=language.hidden_size,
                intermediate_size=language.ffn_hidden_size,
                num_attention_heads=language.num_attention_heads,
                num_key_value_heads=language.num_query_groups,
                vocab_size=language.vocab_size,
                tie_word_embeddings=language.tie_embeddings,
            )
        )
        tower = VisionTowerConfig(vision, seed=0).configure_model()
    planned = model_parameters(config)
    assert sum(planned[part] for part in LANGUAGE) == sum(p.numel() for p in decoder.parameters())
    assert planned["vision"] == sum(p.numel() for p in tower.parameters())
    width = language.hidden_size
    features, inner = vision.hidden_size, width
    if vision.family == "qwen25_vl":  # the MLP of its merger of 2 x 2 patches
        features = inner = 4 * features
    assert planned["projector"] == inner * (features + 1) + width * (inner + 1)


PARTS = {
    "vision": ["vision_model"],
    "projector": ["vision_projection"],
    "embedding": ["embedding"],
    "decoder": ["decoder"],
    "output": ["output_layer"],
    "pre": ["pre_heads"],
    "viral": ["viral_head", "viral_heads"],
    "laver": ["laver_head", "laver_mask_token"],
}


def heads(config: RunConfig) -> list[str]:
    return [objective.name for objective in enabled(config)]


@pytest.fixture(scope="module")
def dinov2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published DINOv2-B by its configuration alone: what a head's width and a plan need of VIRAL's target."""
    from transformers import BitImageProcessor, Dinov2Config

    path = tmp_path_factory.mktemp("dinov2-base")
    Dinov2Config(image_size=518, patch_size=14, architectures=["Dinov2Model"]).save_pretrained(path)
    BitImageProcessor().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", [*one_recipe_for_each(model_name, heads), *LARGE, "interleaved"])
def test_ranks_of_every_model_hold_what_the_built_model_holds(name: str, dinov2_base: Path) -> None:
    if name == "interleaved":
        config = qwen25_72b(pipeline=4, virtual_pipeline=3, pipeline_layers=[2, 7, 7, 8, *[7] * 8])
    else:
        config = config_named(name)
    if config.objective.viral.enabled:
        config.objective.viral.target_path = str(dinov2_base)
    stages = stages_that_differ(config)
    [built] = run_on_standing_ranks(parameters_of_stages, 1, config, stages)
    for stage, found in zip(stages, built, strict=True):
        planned = rank_parameters(config, stage)
        held = {part: sum(found.get(own, 0) for own in names) for part, names in PARTS.items()}
        assert {part: planned.get(part, 0) for part in PARTS} == held and not planned.keys() - PARTS.keys()


def test_published_totals() -> None:
    """Vicuna-7B 6,738,415,616, Qwen2.5-7B 7,615,616,512, Llama-3-70B 70,553,706,496, Qwen2.5-72B 72,706,203,648."""
    for name, published in (
        ("llava15_7b_stage1_align", 6_738_415_616),
        ("siglip2_qwen25_7b_stage1_align", 7_615_616_512),
        ("llama3_70b", 70_553_706_496),
        ("qwen25_72b", 72_706_203_648),
    ):
        planned = model_parameters(config_named(name))
        assert sum(planned[part] for part in LANGUAGE) == published


@pytest.mark.parametrize("split", [None, [19, 21, 21, 19], [1, 26, 26, 27]])
def test_stages_together_hold_the_model_however_uneven_the_split(split: list[int] | None) -> None:
    config = qwen25_72b(tensor=1, sequence=False, pipeline=4, pipeline_layers=split)
    stages = [rank_parameters(config, stage) for stage in range(4)]
    whole = model_parameters(config)
    assert {part: sum(stage[part] for stage in stages) for part in whole} == whole
    sizes = split or [20] * 4
    final_norm = [0, 0, 0, config.model.language.hidden_size]
    assert [stage["decoder"] for stage in stages] == [
        size * layer_parameters(config) + norm for size, norm in zip(sizes, final_norm, strict=True)
    ]


def test_virtual_stages_deal_layers_out_in_turn() -> None:
    config = tiny(parallel={"pipeline": 2, "virtual_pipeline": 2})
    assert chunks_of_stages(config) == [
        [Chunk(range(0, 1), True, False), Chunk(range(2, 3), False, False)],
        [Chunk(range(1, 2), False, False), Chunk(range(3, 4), False, True)],
    ]


def test_a_split_that_does_not_fit_is_refused() -> None:
    for parallel, sentence in (
        ({"pipeline": 2, "pipeline_layers": [1, 2]}, r"pipeline_layers=\[1, 2\] must be 2 numbers .* add up to"),
        ({"pipeline": 2, "pipeline_layers": [4, 0]}, "2 numbers above 0"),
        ({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [1, 3]}, "must be 4 numbers"),
        ({"pipeline": 3}, "parallel.pipeline=3 must divide model.language.num_layers=4, or parallel.pipeline_layers"),
    ):
        with pytest.raises(ValueError, match=sentence):
            chunks_of_stages(tiny(parallel=parallel))
