"""Mixed attention, visual positions and LaVer: what is refused, what warns, and what the recipes say."""

from __future__ import annotations

import pytest

import recipes
from nemo_pre.checks.memory import estimate_memory
from nemo_pre.checks.run import check_options
from nemo_pre.config.compose import compose_run
from nemo_pre.objectives.laver import LaVerConfig
from tests.checks.test_run import run_with

LAVER = ["objective=laver/paper", "model.attention=mixed", "model.rope=2d"]

NATIVE = [
    "model.vision.family=qwen25_vl", "model.vision.image_size=0", "model.vision.feature_layer=-1",
    "model.vision.drop_class_token=false", "model.vision.min_visual_tokens=1", "model.vision.max_visual_tokens=16",
    "model.vision.window_size=32", "model.vision.full_attention_layers=[1]",
]  # fmt: skip

AIMV2 = [
    "model.vision.family=aimv2_native", "model.vision.image_size=0", "model.vision.drop_class_token=false",
    "model.vision.min_visual_tokens=1", "model.vision.max_visual_tokens=16",
]  # fmt: skip

REFUSED = [
    (["objective=laver/paper"], "LaVer's masked images must see themselves both ways and nothing else: set model.att"),
    (["model.attention=prefix"], "model.attention=prefix is unknown: choose one of causal, mixed."),
    (["model.rope=3d"], "model.rope=3d is unknown: choose one of 1d, 2d, mrope."),
    (["model.rope=2d", "model.rope_sections=[8,9]"], "model.rope_sections=[8, 9] must be 2 numbers for model.rope=2d"),
    (["model.rope=2d", "model.vision.drop_class_token=false"], "model.rope=2d places a grid of patches: set model.vi"),
    (
        ["model.attention=mixed", "model.attention_backend=flex", "platform=cpu"],
        "model.attention_backend=flex has no backward pass on a CPU: set it to auto, dense or split.",
    ),
    (
        [*LAVER, "objective.laver.sequence=rows"],
        "objective.laver.sequence=rows is unknown: choose one of im",
    ),
    ([*LAVER, "objective.laver.teacher_memory=no"], "objective.laver.teacher_memory=no is unknown: choose one of res"),
    ([*LAVER, "objective.laver.mask_ratio=1.2"], "objective.laver.mask_ratio=1.2 must lie between 0 and 1."),
    ([*LAVER, "objective.laver.momentum=-0.1"], "objective.laver.momentum=-0.1 must lie between 0 and 1."),
    ([*LAVER, "objective.laver.gram_weight=-1"], "objective.laver.gram_weight=-1.0 must be 0 or more."),
    ([*LAVER, "objective.laver.update_every=0"], "objective.laver.update_every=0 must be 1 or more."),
    (
        [*LAVER, "objective.laver.teacher_temperature=0"],
        "objective.laver.teacher_temperature=0.0 must be m",
    ),
    (
        [*LAVER, "objective.laver.mask_token_id=9999"],
        "objective.laver.mask_token_id=9999 is no token of a voc",
    ),
    (
        ["objective=laver/released_code", "model.attention=mixed"],
        "objective.laver.mask_token=embedding needs objective.laver.mask_token_id, the tokenizer's image-pad token",
    ),
    (["objective.lm_weight=-1"], "objective.lm_weight=-1.0 must be 0 or more."),
    (["trainer.log_grad_norms_every=0"], "trainer.log_grad_norms_every=0 must be 1 or more."),
    (
        ["model.vision.family=vit"],
        "model.vision.family=vit is unknown: choose one of clip, siglip, dinov2, aimv2, aim",
    ),
    (["model.vision.family=aimv2"], "model.vision.family=aimv2 has no class token: set model.vision.drop_class_token"),
    (["model.vision.family=patch_mlp"], "model.vision.family=patch_mlp has no layers: set model.vision.num_layers=0"),
    (["model.vision.num_layers=0"], "model.vision.num_layers=0 must be 1 or more."),
    (
        ["model.vision.family=dinov2", "model.vision.intermediate_size=100"],
        "model.vision.intermediate_size=100 must be a multiple of model.vision.hidden_size=96",
    ),
    (["model.vision.image_size=0"], "model.vision.image_size=0 must be 1 or more."),
    (["model.vision.window_size=56"], "model.vision.window_size, full_attention_layers are of qwen25_vl: set them to"),
    (
        ["model.vision.max_visual_tokens=56"],
        "model.vision.min_visual_tokens, max_visual_tokens are of native resolution: set them to null for clip.",
    ),
    (
        [*AIMV2, "model.vision.image_size=28"],
        "model.vision.family=aimv2_native keeps the size of images: set model.vi",
    ),
    (
        [*AIMV2, "model.vision.window_size=28"],
        "model.vision.window_size, full_attention_layers are of qwen25_vl: set ",
    ),
    (
        [*AIMV2, "model.vision.max_visual_tokens=null"],
        "model.vision.family=aimv2_native needs model.vision.max_visual",
    ),
    (
        [*AIMV2, "model.vision.hidden_size=98"],
        "model.vision.hidden_size=98 must be a multiple of 4: AIMv2's positions",
    ),
    (
        [*AIMV2, "data.max_tiles=5", "trainer.val_samples=0"],
        "model.vision.family=aimv2_native takes images whole: set",
    ),
    ([*NATIVE, "model.vision.image_size=28"], "model.vision.family=qwen25_vl keeps the size of images: set model.vis"),
    ([*NATIVE, "model.vision.feature_layer=-2"], "model.vision.family=qwen25_vl gives its last layer's features: set"),
    (
        [*NATIVE, "model.vision.window_size=null"],
        "model.vision.family=qwen25_vl needs model.vision.window_size: set it",
    ),
    (
        [*NATIVE, "model.vision.max_visual_tokens=3"],
        "model.vision.max_visual_tokens=3 must be at least four times mod",
    ),
    (
        [*NATIVE, "model.vision.min_visual_tokens=0"],
        "model.vision.min_visual_tokens=0 must be 1 or more.",
    ),
    (
        [*NATIVE, "model.vision.window_size=50"],
        "model.vision.window_size=50 must be a multiple of 16 pixels, a visual",
    ),
    ([*NATIVE, "model.vision.full_attention_layers=[1,9]"], "model.vision.full_attention_layers=[1, 9] must name dif"),
    ([*NATIVE, "model.vision.num_attention_heads=48"], "model.vision.hidden_size=96 must be a multiple of four times"),
    (
        [*NATIVE, "model.projector=mcore_mlp"],
        "model.vision.family=qwen25_vl has its merger's MLP as projector: set mo",
    ),
    (
        [*NATIVE, "data.max_tiles=5", "trainer.val_samples=0"],
        "model.vision.family=qwen25_vl takes images whole: set d",
    ),
    (
        [*NATIVE, "objective=pre", "objective.pre.anchor=external", "objective.pre.external_path=dino"],
        "objective.pre.anchor=external needs a fixed resolution, not model.vision.family=qwen25_vl: set it to pre_llm",
    ),
    ([*NATIVE, "trainer.log_diagnostics_every=5"], "trainer.log_diagnostics_every needs a fixed resolution, not qwen"),
    (
        [*NATIVE, "data.features=features", "optim.freeze_vision=true"],
        "data.features holds as many tokens for every image, unlike native resolution: set data.features=null.",
    ),
    ([*NATIVE, "data.sequence_length=17"], "data.sequence_length=17 leaves no room for text beside an image of 16 v"),
    (
        ["model.vision.family=dinov2", "model.rope=2d", "model.vision.drop_class_token=false"],
        "model.rope=2d places a grid of patches: set model.vision.drop_class_token=true.",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED, ids=[case[0][-1] for case in REFUSED])
def test_a_run_that_cannot_work_is_refused(overrides, sentence):
    with pytest.raises(ValueError) as refusal:
        check_options(run_with(*overrides))
    text = str(refusal.value)
    assert text.startswith(sentence) and text.endswith(".") and "\n" not in text


WARNED = [
    ([*NATIVE, "data.image_resize=pad"], "data.image_resize=pad has no effect: qwen25_vl keeps aspect ratios."),
    (
        ["model.attention_backend=dense"],
        "model.attention_backend has no effect with model.attention=causal and data.packing=false.",
    ),
    (["model.rope_sections=[8,8]"], "model.rope_sections has no effect with model.rope=1d."),
    (
        ["objective.laver.mask_ratio=0.3"],
        "objective.laver.mask_ratio have no effect with objective.laver.enabled=false.",
    ),
    (
        [*LAVER, "objective.laver.mask_token_id=5"],
        "objective.laver.mask_token_id has no effect with objective.laver.mask_token=learned.",
    ),
    (
        [*LAVER, "objective.laver.center_momentum=0.5"],
        "objective.laver.center_momentum has no effect with objective.laver.centring=false.",
    ),
    (
        [*LAVER, "objective.laver.update_every=2", "objective.laver.update_fraction=0.1"],
        "objective.laver.update_every has no effect where update_fraction is set.",
    ),
    (
        [*LAVER, "objective.laver.mim_weight=0", "objective.laver.gram_weight=0"],
        "objective.laver costs a second sequence and a teacher and has no effect with both weights 0.",
    ),
    (
        [*LAVER, "optim.freeze_language=true"],
        "objective.laver trains the language model, which optim.freeze_language=true keeps as it is.",
    ),
]


@pytest.mark.parametrize(("overrides", "warning"), WARNED, ids=[case[0][-1] for case in WARNED])
def test_an_option_without_effect_is_warned_of(overrides, warning):
    assert check_options(run_with(*overrides)) == [warning]


@pytest.mark.parametrize("name", ["laver", "laver/paper", "pre_laver"])
def test_the_papers_preset_is_the_default(name):
    laver = compose_run(["experiment=digits_tiny", f"objective={name}"]).objective.laver
    assert laver == LaVerConfig(enabled=True)
    assert compose_run(["experiment=digits_tiny", f"objective={name}"]).objective.pre.enabled == (name == "pre_laver")
    assert name in recipes.choices("objective")


def test_the_released_codes_preset_names_what_it_does_differently():
    laver = compose_run(
        ["experiment=digits_tiny", "objective=laver/released_code", "objective.laver.mask_token_id=3"]
    ).objective.laver
    assert laver == LaVerConfig(
        enabled=True,
        sequence="whole",
        mask_sampling="count",
        mask_token="embedding",
        mask_token_id=3,
        centring=True,
        mim_reduction="micro_batch",
        gram_clipped=False,
        gram_scope="micro_batch",
        momentum=0.95,
        momentum_schedule="cosine",
        update_fraction=0.02,
    )
    assert (laver.student_temperature, laver.teacher_temperature, laver.center_momentum) == (0.1, 0.04, 0.9)


# Stage: learning rate, steps, warm-up steps, LaVer on. Source: the released code's examples/train_full/laver.
STAGES = {
    "stage1_align": (2e-3, 4360, 500, False),
    "stage2_knowledge": (2e-5, 6250, 100, True),
    "stage2_knowledge_pre": (2e-5, 6250, 100, True),
    "stage2_released_code": (2e-5, 6250, 100, True),
    "stage3_instruct": (2e-5, 6250, 100, False),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_three_stages_have_the_published_figures(stage):
    config = compose_run([f"experiment=siglip2_qwen25_7b_laver_{stage}"])
    rate, steps, warm_up, laver = STAGES[stage]
    assert (config.optim.lr, config.trainer.max_steps, config.trainer.global_batch_size) == (rate, steps, 128)
    assert round(config.optim.warmup_ratio * steps) == warm_up
    assert config.data.sequence_length == 2048
    assert config.objective.laver.enabled is laver
    assert config.model.attention == "mixed", "in all stages"
    assert config.model.rope == ("mrope" if stage == "stage2_released_code" else "2d")
    assert config.optim.freeze_vision and config.optim.freeze_language is (stage == "stage1_align")
    assert check_options(config) == []
    former = {"stage3_instruct": "stage2_knowledge"}.get(stage, "stage1_align")
    expected = f"runs/siglip2_qwen25_7b_laver_{former}/checkpoints"
    assert config.init_from == ("checkpoints/siglip2_qwen25_7b" if stage == "stage1_align" else expected)


def test_the_memory_estimate_counts_head_and_teacher():
    plain = estimate_memory(run_with("model.attention=mixed"))
    laver = estimate_memory(run_with(*LAVER))
    width, head = 128, 2048
    parameters = head * (width + 1) + head * (head + 1) + width * head
    mask_token = width
    assert laver.parameters - plain.parameters == parameters + mask_token
    decoder = 8 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352 + 2 * 128) + 128
    # fp32: weight, gradient and two moments of head and mask token; average and computing copy of head and decoder
    added = 16 * (parameters + mask_token) + 8 * (parameters + decoder)
    assert laver.bytes_per_rank - plain.bytes_per_rank == added
    gathered = estimate_memory(run_with(*LAVER, "objective.laver.teacher_memory=gathered"))
    assert laver.bytes_per_rank - gathered.bytes_per_rank == 4 * decoder  # the head, the largest, stays as a buffer
