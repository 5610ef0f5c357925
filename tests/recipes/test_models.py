"""Every model recipe is the published architecture: parameters and names of weights, values beside them, pixels."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from typing import Any

import pytest

import recipes
from nemo_pre.config.compose import compose_config, compose_run
from nemo_pre.config.derived import num_visual_tokens
from nemo_pre.config.schema import ModelConfig
from nemo_pre.huggingface.architecture import hf_config
from nemo_pre.huggingface.weights import HF_LANGUAGE, language_weights, projector_weights
from nemo_pre.planner.parameters import LANGUAGE, model_parameters

# From each model's config.json on the hub, with the sum of its weights: parameters, layers, vocabulary, query groups,
# rope theta, epsilon of the norms, tied embeddings, positions.
PUBLISHED = {
    "vicuna_7b": (6_738_415_616, 32, 32000, 32, 1e4, 1e-5, False, 4096),
    "vicuna_13b": (13_015_864_320, 40, 32000, 40, 1e4, 1e-5, False, 4096),
    "qwen25_1_5b": (1_543_714_304, 28, 151936, 2, 1e6, 1e-6, True, 32768),
    "qwen25_3b": (3_085_938_688, 36, 151936, 2, 1e6, 1e-6, True, 32768),
    "qwen25_7b": (7_615_616_512, 28, 152064, 4, 1e6, 1e-6, False, 32768),
    "qwen25_14b": (14_770_033_664, 48, 152064, 8, 1e6, 1e-6, False, 32768),
    "qwen25_32b": (32_763_876_352, 64, 152064, 8, 1e6, 1e-6, False, 32768),
    "qwen25_72b": (72_706_203_648, 80, 152064, 8, 1e6, 1e-6, False, 32768),
    "smollm2_135m": (134_515_008, 30, 49152, 3, 1e5, 1e-5, True, 8192),
    "llama3_8b": (8_030_261_248, 32, 128256, 8, 5e5, 1e-5, False, 8192),
    "llama3_70b": (70_553_706_496, 80, 128256, 8, 5e5, 1e-5, False, 8192),
}
# Parameters of published towers, and the patch and image size they are published for.
TOWERS = {
    "clip_l14_336": (303_507_456, 14, 336),
    "siglip2_so400m_384": (428_225_600, 14, 378),  # SigLIP's first version, whose shape SigLIP2 kept
    "dinov2_l14_336": (304_368_640, 14, 518),
}
MODELS = [name for name in recipes.choices("model") if name not in ("digits_tiny", "of_init_from")]


@cache
def with_parts(vision: str, language: str) -> Any:
    words = ["model=llava15_7b", f"model/vision={vision}", f"model/language={language}", "stage=stage2_full"]
    return compose_run([*words, "data.sequence_length=4096"])


@cache
def hf_language(language: str) -> Any:
    """transformers' language model of the exported config, without memory."""
    return on_meta(hf_config(with_parts("clip_l14_336", language).model, 0, 4096, "bfloat16")["text_config"])


def on_meta(values: dict[str, Any]) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    import nemo_pre.huggingface.remote_code.modeling_spatial_llava  # noqa: F401  # knows a patch MLP

    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with torch.device("meta"):
        if values["model_type"] in ("llama", "qwen2"):
            return AutoModelForCausalLM.from_config(config)
        return AutoModel.from_config(config)


def size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_language_model_is_in_the_table():
    assert set(recipes.choices("model/language")) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_language_model_is_the_published_one(name):
    parameters, *values = PUBLISHED[name]
    config = hf_language(name).config
    assert size(hf_language(name)) == parameters
    assert values == [
        config.num_hidden_layers,
        config.vocab_size,
        config.num_key_value_heads,
        config.rope_theta,
        config.rms_norm_eps,
        config.tie_word_embeddings,
        config.max_position_embeddings,
    ]
    planned = model_parameters(with_parts("clip_l14_336", name))
    assert sum(planned[part] for part in LANGUAGE) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weights_of_our_checkpoint_are_those_of_transformers_by_name_and_shape(name):
    language = with_parts("clip_l14_336", name).model.language
    ours = {part: shape for weight in language_weights(language) for part, shape in weight.parts.items()}
    theirs = {HF_LANGUAGE + key: tuple(tensor.shape) for key, tensor in hf_language(name).named_parameters()}
    assert ours == theirs


@pytest.mark.parametrize("name", [name for name in recipes.choices("model/vision") if name != "qwen25_vl_vit"])
def test_a_tower_is_counted_built_and_exported_as_the_same_one(name):
    import torch

    from nemo_pre.neva.vision import VisionTowerConfig

    config = with_parts(name, "qwen25_3b")
    with torch.device("meta"):
        built = VisionTowerConfig(config.model.vision, seed=0).configure_model()
    assert size(built) == model_parameters(config)["vision"]
    tower = on_meta(hf_config(config.model, 0, 4096, "bfloat16")["vision_config"])
    shapes = {key: tensor.shape for key, tensor in tower.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in built.state_dict().items()}


def test_qwen25_vls_tower_and_projector_are_transformers_tower_with_its_merger():
    """Qwen2.5-VL-7B's whole vision part has 676,550,144 parameters (its index of weights)."""
    import torch
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    from nemo_pre.huggingface.qwen_vl import tower_config
    from nemo_pre.neva.vision import VisionTowerConfig

    published = Qwen2_5_VLVisionConfig(hidden_size=1280)
    config = compose_run(["model=qwen25vl_qwen25_7b", "stage=stage1_align"])
    assert tower_config(published.to_dict(), "here") == config.model.vision
    with torch.device("meta"):
        theirs = Qwen2_5_VisionTransformerPretrainedModel(published)
        built = VisionTowerConfig(config.model.vision, seed=0).configure_model()
    planned, merger = model_parameters(config), size(theirs.merger.mlp)
    assert (size(built), planned["vision"], planned["projector"]) == (size(theirs) - merger, size(built), merger)
    assert size(theirs) == 676_550_144
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items() if "merger.mlp" not in key}
    assert shapes == {key: tensor.shape for key, tensor in built.state_dict().items()}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_has_the_published_size_at_its_own_resolution(name):
    parameters, patch_size, image_size = TOWERS[name]
    config = deepcopy(with_parts(name, "qwen25_3b"))
    config.model.vision.patch_size, config.model.vision.image_size = patch_size, image_size
    assert model_parameters(config)["vision"] == parameters


def test_aimv2_fills_the_published_file_of_float32():
    """https://huggingface.co/apple/aimv2-large-patch14-336: model.safetensors has 1.24 GB."""
    assert round(model_parameters(with_parts("aimv2_l14_336", "qwen25_3b"))["vision"] * 4 / 1e9, 2) == 1.24


def test_aimv2_at_native_resolution_is_the_published_one_and_has_no_stored_positions(tmp_path):
    """https://huggingface.co/apple/aimv2-large-patch14-native: its shape and its processor, in
    transformers' names, and 1.24 GB of float32 too."""
    from nemo_pre.huggingface.pixels import fit_tower, read_pixels
    from nemo_pre.huggingface.qwen_vl import tower_config

    published = {
        "model_type": "aimv2_vision_model", "is_native": True, "use_head": False, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8,
        "image_size": 224, "patch_size": 14, "num_channels": 3, "rms_norm_eps": 1e-05, "qkv_bias": False,
        "mlp_bias": False, "attention_dropout": 0.0,
    }  # fmt: skip
    config = with_parts("aimv2_l14_native", "qwen25_3b")
    statistics = {name: list(getattr(config.model.vision, name)) for name in ("image_mean", "image_std")}
    processor = {"do_resize": False, "do_center_crop": False, "size": {"shortest_edge": 224}, **statistics}
    processor["image_processor_type"] = "CLIPImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    vision = tower_config(published, "here")
    assert fit_tower(read_pixels(tmp_path, vision), vision).image_filter == config.data.image_filter
    assert vision == config.model.vision
    positions = 576 * 1024
    planned = model_parameters(config)["vision"]
    assert planned == model_parameters(with_parts("aimv2_l14_336", "qwen25_3b"))["vision"] - positions
    assert round(planned * 4 / 1e9, 2) == 1.24


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_named_after_its_parts_and_its_projector_fits_both(name):
    model: ModelConfig = compose_run([f"model={name}", "stage=stage2_full"]).model
    choices = compose_config([f"model={name}"])
    assert model.name == choices.model.name == name
    tower, language = name.replace("llava15", "clip_vicuna").split("_", 1)
    families = {
        "siglip2": "siglip",
        "clip672": "clip",
        "patch": "patch_mlp",
        "qwen25vl": "qwen25_vl",
        "aimv2native": "aimv2_native",
    }
    assert model.vision.family == families.get(tower, tower)
    published = PUBLISHED[language.removeprefix("mlp_")]
    assert (model.language.num_layers, model.language.vocab_size) == published[1:3]
    features, width = model.vision.hidden_size, model.language.hidden_size
    inner = width
    if tower == "qwen25vl":  # the merger's MLP, of 2 x 2 patches
        features = inner = 4 * features
    shapes = [(inner, features), (inner,), (width, inner), (width,)]
    assert [weight.shape for weight in projector_weights(model)] == shapes


@pytest.mark.parametrize("name", recipes.choices("model/vision"))
def test_pixels_are_normalised_and_resized_as_the_encoders_own_processor_does(name):
    from transformers import image_utils

    config = with_parts(name, "qwen25_3b")
    vision = config.model.vision
    mean, std, how = {
        "clip": (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD, ("crop", "bicubic")),
        "siglip": (image_utils.IMAGENET_STANDARD_MEAN, image_utils.IMAGENET_STANDARD_STD, ("whole", "bilinear")),
        "dinov2": (image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD, ("crop", "bicubic")),
        "aimv2": (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD, ("crop", "bicubic")),
        "aimv2_native": (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD, ("whole", "bicubic")),
        "qwen25_vl": (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD, ("whole", "bicubic")),
        "patch_mlp": (image_utils.IMAGENET_STANDARD_MEAN, image_utils.IMAGENET_STANDARD_STD, ("whole", "bicubic")),
    }[vision.family]
    assert (vision.image_mean, vision.image_std) == (list(mean), list(std))
    aligned = compose_run(
        ["model=llava15_7b", f"model/vision={name}", "stage=stage1_align", "data.sequence_length=2560"]
    )
    assert (aligned.data.image_resize, aligned.data.image_filter) == how
    others = {"clip_l14_672": 2304, "qwen25_vl_vit": 1280, "aimv2_l14_native": 1280}
    assert num_visual_tokens(config.model) == others.get(name, 576)
