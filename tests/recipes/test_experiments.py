"""Every experiment is a run that could start on its machines, and says what the papers' tables say."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from functools import cache

import pytest

import recipes
from nemo_pre.checks.memory import estimate_memory
from nemo_pre.checks.run import check_options
from nemo_pre.config.compose import compose_config, compose_run
from nemo_pre.config.derived import num_visual_tokens, world_size
from nemo_pre.config.schema import PrecisionConfig
from nemo_pre.objectives.objective import target_layers
from nemo_pre.planner.devices import DEVICES, Efficiency
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.step_time import step_time
from tests.composed import experiment

EXPERIMENTS = recipes.choices("experiment")
ON_GPUS = [name for name in EXPERIMENTS if not name.startswith(("digits", "smollm2"))]
FROZEN_TOWER, ALL, PROJECTOR = ("vision",), (), ("vision", "language")
# Learning rates (all; of the tower), samples a step, steps, warm-up in steps, what is frozen, PRe, LaVer. VIRAL trains
# as LLaVA-1.5 does (arXiv 2509.07979).
# PRe: its supplement, section 7 (arXiv 2603.20808); an epoch of LLaVA's 558,128 captions and 665,298 instructions.
# LaVer: figures of its notes and of its released code's three configurations (arXiv 2512.06281).
STAGES = {
    "stage1_align": (1e-3, None, 256, -(-558_128 // 256), 0.03 * 2181, PROJECTOR, False, False),
    "stage2_frozen": (2e-5, None, 128, -(-665_298 // 128), 0.03 * 5198, FROZEN_TOWER, False, False),
    "stage2_frozen_pre": (2e-5, None, 128, -(-665_298 // 128), 0.03 * 5198, FROZEN_TOWER, True, False),
    "stage2_full": (1e-5, 2e-6, 128, -(-665_298 // 128), 0.03 * 5198, ALL, False, False),
    "stage2_full_pre": (1e-5, 2e-6, 128, -(-665_298 // 128), 0.03 * 5198, ALL, True, False),
    "stage2_full_viral": (1e-5, 2e-6, 128, -(-665_298 // 128), 0.03 * 5198, ALL, False, False),
    "laver_stage1_align": (2e-3, None, 128, 558_128 // 128, 500, PROJECTOR, False, False),
    "laver_stage2_knowledge": (2e-5, None, 128, 800_000 // 128, 100, FROZEN_TOWER, False, True),
    "laver_stage2_knowledge_pre": (2e-5, None, 128, 800_000 // 128, 100, FROZEN_TOWER, True, True),
    "laver_stage2_released_code": (2e-5, None, 128, 800_000 // 128, 100, FROZEN_TOWER, False, True),
    "laver_stage3_instruct": (2e-5, None, 128, 800_000 // 128, 100, FROZEN_TOWER, False, False),
}
DATA = {
    "stage1_align": "llava_pretrain",
    "laver_stage2_knowledge": "finevision",
    "laver_stage2_released_code": "finevision",
    "laver_stage3_instruct": "llava_onevision",
}
# PRe's layer (main text, section 4): the middle one.
MIDDLE = {"vicuna_7b": 16, "llava15_7b": 16, "qwen25_7b": 14, "qwen25_3b": 18}
TEMPLATE = {"llava15": "llava_v1", "llama3": "llama3", "qwen25vl": "qwen_vl", "qwen25": "chatml"}

HALVED = {"siglip2_qwen25_14b_stage1_align"}  # the micro-batch, with FP8
# 768 tokens are no whole blocks of 128 for each of four sequence-parallel ranks.
LONGER = {"siglip2_llama3_70b_stage1_align", "siglip2_qwen25_72b_stage1_align"}


@cache
def recipe_of(precision: str) -> PrecisionConfig:
    chosen = compose_config([f"precision={precision}"]).precision
    return PrecisionConfig(name=chosen.name, bf16_layers=chosen.bf16_layers)


def stage_of(name: str) -> str:
    return max((stage for stage in STAGES if name.endswith(f"_{stage}")), key=len)


@pytest.mark.parametrize("name", ON_GPUS)
def test_hyperparameters_are_the_papers(name):
    config, stage = experiment(name), stage_of(name)
    optim, trainer, objective = config.optim, config.trainer, config.objective
    frozen = tuple(part for part in ("vision", "projector", "language") if getattr(optim, f"freeze_{part}"))
    lr, lr_vision, batch, steps, warmup, parts, pre, laver = STAGES[stage]
    if name.startswith("patch_mlp"):  # there is no encoder that was trained before
        parts = tuple(part for part in parts if part != "vision")
    assert (optim.lr, optim.lr_vision, trainer.global_batch_size, trainer.max_steps) == (lr, lr_vision, batch, steps)
    assert optim.warmup_ratio * trainer.max_steps == pytest.approx(warmup, abs=0.5)
    assert (optim.weight_decay, optim.min_lr_ratio, optim.lr_projector, optim.lr_language) == (0.0, 0.0, None, None)
    assert (frozen, objective.pre.enabled, objective.laver.enabled) == (parts, pre, laver)
    assert (objective.lm_weight, config.precision.name) == (1.0, "bf16")
    if pre:
        layers = config.model.language.num_layers
        assert (objective.pre.weight, target_layers(objective.pre.layers, layers, "layers")) == (0.5, (layers // 2,))
        expected = next((layer for model, layer in MIDDLE.items() if model in name), layers // 2)
        assert target_layers(objective.pre.layers, layers, "layers") == (expected,)
    assert objective.viral.enabled == stage.endswith("viral")
    if objective.viral.enabled:
        viral = objective.viral
        assert (viral.weight, viral.form, viral.shared_head, viral.head_depth) == (0.5, "direct", True, 3)
        assert (viral.head_hidden_width, viral.target_image_size, viral.target_filter) == (2048, 336, "bilinear")
        assert target_layers(viral.layers, config.model.language.num_layers, "layers") == (
            config.model.language.num_layers // 2,
        )
    spatial = ("causal", "mrope" if name.startswith("qwen25vl") else "1d")
    if "laver" in stage:
        spatial = ("mixed", "mrope" if stage.endswith("released_code") else "2d")
    assert (config.model.attention, config.model.rope) == spatial, "in all three stages of LaVer"
    if laver:
        how = objective.laver
        assert (how.mim_weight, how.gram_weight, how.mask_ratio, how.mask_schedule) == (1.0, 1.0, 0.05, "cosine")
        assert (how.student_temperature, how.teacher_temperature) == (0.1, 0.04)
        assert how.momentum == (0.95 if stage.endswith("released_code") else 0.999)


@pytest.mark.parametrize("name", ON_GPUS)
def test_data_and_template_are_those_of_the_stage_and_the_language_model(name):
    config, stage = experiment(name), stage_of(name)
    data = (
        "llava_pretrain"
        if "align" in stage
        else DATA.get(stage.removesuffix("_pre").removesuffix("_viral"), "llava_instruct")
    )
    family = next(family for family in TEMPLATE if family in name)
    assert config.data.name == data
    caption = "llava_caption" if family == "llava15" else "caption"
    assert config.data.chat_template == (caption if "align" in stage else TEMPLATE[family])
    assert config.data.sequence_length >= num_visual_tokens(config.model) + 190
    assert config.data.sequence_length <= (config.model.language.max_position_embeddings or 0)
    assert config.model.tokenizer, "the data's own is for digits"


@pytest.mark.parametrize("name", ON_GPUS)
def test_it_fits_its_gpus_and_keeps_the_stages_of_its_pipeline_busy_alike(name, monkeypatch):
    monkeypatch.setattr("nemo_pre.checks.run.visible_gpus", lambda: 0)
    config = experiment(name)
    assert check_options(config) == []
    cluster = config.cluster
    assert world_size(config.parallel) == cluster.nodes * (cluster.devices_per_node or 0)
    assert estimate_memory(config).problem() is None
    time = step_time(config, largest_load(config), DEVICES["h100"], Efficiency())
    assert time.balance > 0.9
    assert time.bubble < 0.06


@pytest.mark.parametrize("precision", [name for name in recipes.choices("precision") if name.startswith("fp8")])
@pytest.mark.parametrize("name", ON_GPUS)
def test_it_is_legal_in_fp8_and_fits_some_with_half_the_micro_batch(name, precision, monkeypatch):
    """FP8 copies of the weights take what bf16 left free in one of them."""
    monkeypatch.setattr("nemo_pre.checks.run.visible_gpus", lambda: 0)
    config = replace(experiment(name), platform="gpu", dry_run=True, precision=recipe_of(precision))
    if name in LONGER and precision == "fp8_blockwise":
        with pytest.raises(ValueError, match="data.sequence_length=768 must be a multiple of 512"):
            check_options(config)
        config = replace(config, data=replace(config.data, sequence_length=1024))
    assert check_options(config) == []
    fits = estimate_memory(config).problem() is None
    assert fits == (name not in HALVED)
    if not fits:
        half = replace(config.trainer, micro_batch_size=config.trainer.micro_batch_size // 2)
        assert check_options(replace(config, trainer=half)) == []
        assert estimate_memory(replace(config, trainer=half)).problem() is None


def test_a_stage_starts_from_the_stage_before_it_or_from_imported_weights():
    for name in ON_GPUS:
        config, stage = experiment(name), stage_of(name)
        before = {"stage1": None, "stage2": "stage1_align", "stage3": "stage2_knowledge"}[
            re.findall(r"stage\d", stage)[0]
        ]
        line = "laver_" if "laver" in stage else ""
        model = config.model.name
        expected = f"checkpoints/{model}" if before is None else f"runs/{model}_{line}{before}/checkpoints"
        assert (config.name, config.init_from) == (name, expected)


def test_names_are_model_and_stage_and_every_model_has_an_experiment():
    stages = defaultdict(set)
    for name in ON_GPUS:
        stages[experiment(name).model.name].add(stage_of(name))
        assert name == f"{experiment(name).model.name}_{stage_of(name)}"
    others = {"digits_tiny", "of_init_from", "patch_mlp_smollm2_135m"}
    assert set(stages) == set(recipes.choices("model")) - others
    assert all({"stage1_align", "laver_stage1_align"} & found for found in stages.values()), "where each begins"


def test_encoders_language_models_and_stages_go_together_on_the_command_line(monkeypatch):
    """Every one of each, in turn with those of the others."""
    monkeypatch.setattr("nemo_pre.checks.run.visible_gpus", lambda: 0)
    encoders, languages = recipes.choices("model/vision"), recipes.choices("model/language")
    assert set(recipes.choices("stage")) == set(STAGES)
    stages = [stage for stage in STAGES if stage != "laver_stage2_released_code"]  # of Qwen2.5 alone
    for number in range(3 * len(languages)):
        vision, language, stage = (names[number % len(names)] for names in (encoders, languages, stages))
        parts = [f"model/vision={vision}", f"model/language={language}", f"model.name={vision}_{language}"]
        options = ["data.sequence_length=4096", "optim.freeze_vision=false"]
        if stage.endswith("viral"):  # a target of DINOv2's grid needs an encoder of a fixed resolution
            options += ["objective.viral.target=encoder"]
        config = compose_run(["model=llava15_7b", *parts, f"stage={stage}", *options])
        check_options(config)
        assert config.name == f"{vision}_{language}_{stage}"


def test_a_stage_can_be_changed_on_the_command_line_and_its_name_with_it():
    config = compose_run(["experiment=siglip2_qwen25_72b_laver_stage2_knowledge", "stage=laver_stage3_instruct"])
    assert config.name == "siglip2_qwen25_72b_laver_stage3_instruct"
    assert (config.data.name, config.objective.laver.enabled, config.parallel.pipeline) == (
        "llava_onevision",
        False,
        8,
    )


def test_an_untrained_patch_mlp_is_not_frozen_without_a_word(monkeypatch):
    monkeypatch.setattr("nemo_pre.checks.run.visible_gpus", lambda: 0)
    words = ["experiment=patch_mlp_qwen25_7b_laver_stage1_align", "optim.freeze_vision=true"]
    (warning,) = check_options(compose_run(words))
    assert "keeps a patch MLP as it was drawn" in warning
