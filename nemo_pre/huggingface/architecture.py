"""A LLaVA's ``config.json`` as our model configuration and back, and what of it we cannot build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import recipes
from nemo_pre.config.derived import COLUMN, ROW, TIME, axis_of_frequency
from nemo_pre.config.schema import LanguageConfig, ModelConfig, RopeScalingConfig, VisionConfig
from nemo_pre.config.vision_families import FAMILIES, class_tokens, is_native, kept_class_tokens, transformers_values
from nemo_pre.huggingface.qwen_vl import (
    AIMV2_MODEL_TYPE,
    QWEN_VL,
    SPATIAL_QWEN_VL,
    hf_values,
    is_plain,
    require,
    text_config,
    tower_config,
)

SPATIAL = "spatial_llava"  # our custom code's model_type, see remote_code/
LANGUAGE_FAMILIES = {"llama": "llama", "qwen2": "qwen2"}  # transformers' model_type: ours
VISION_FAMILIES = {family.model_type: name for name, family in FAMILIES.items() if not family.native}
WHOLE_MODELS = ("clip", "siglip")  # whose files name the vision tower's weights as the tower's own files do
# What our layers do, and nothing else: a config that says otherwise is refused.
LANGUAGE_MUST = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
LLAVA_MUST = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}


def read_whole(directory: Path) -> ModelConfig:
    """The model of a LLaVA's or a Qwen2.5-VL's directory, or of one that we exported.

    Raises:
        ValueError: neither, or one with a part that we do not have.
    """
    values = _read_json(directory / "config.json")
    native = values.get("model_type") in (QWEN_VL, SPATIAL_QWEN_VL)
    return _read_qwen_vl(directory, values) if native else read_llava(directory)


def _read_qwen_vl(directory: Path, values: dict[str, Any]) -> ModelConfig:
    where = f"{directory}/config.json"
    text, sections = text_config(values)
    model = ModelConfig(
        name=directory.resolve().name,
        vision=tower_config(values, where),
        language=_language(_from_dict(text), where),
        rope="mrope",
        tokenizer=str(directory),
    )
    axes: list[int] | None = [axis for axis, size in enumerate(sections) for _ in range(size)]
    if values["model_type"] == SPATIAL_QWEN_VL:
        config = _config_class(SPATIAL_QWEN_VL).from_dict(values)
        model.attention, model.rope, axes = config.visual_attention, config.visual_rope, config.rope_axes
    model.rope_sections = _sections(axes, model)
    return model


def read_llava(directory: Path) -> ModelConfig:
    """The model of a LLaVA's directory.

    Raises:
        ValueError: not a LLaVA, or one with a part that we do not have.
    """
    values = _read_json(directory / "config.json")
    where = f"{directory}/config.json"
    spatial = values.get("model_type") == SPATIAL
    if values.get("model_type") not in ("llava", SPATIAL):
        raise ValueError(
            f"{where} has model_type={values.get('model_type')}: only {', '.join(ARCHITECTURES)} are imported."
        )
    config = _config_class(values["model_type"]).from_dict(values)
    require(where, config, LLAVA_MUST)
    vision = _vision(config.vision_config, where)
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"{where} has vision_feature_layer={config.vision_feature_layer}: only one layer is imported."
        )
    vision.feature_layer = config.vision_feature_layer
    vision.drop_class_token = config.vision_feature_select_strategy == "default"
    if vision.drop_class_token and not class_tokens(vision):
        raise ValueError(
            f"{where} has vision_feature_select_strategy=default with a tower that has no class token, which would "
            f"drop a patch: it must be full."
        )
    model = ModelConfig(
        name=directory.resolve().name,
        vision=vision,
        language=_language(config.text_config, where),
        tokenizer=str(directory),
    )
    if spatial:
        model.attention, model.rope = config.visual_attention, config.visual_rope
        model.rope_sections = _sections(config.rope_axes, model)
    return model


def read_parts(vision: Path, language: Path, name: str) -> ModelConfig:
    """A fresh VLM from a vision tower's directory (or that of a whole CLIP or SigLIP) and a language model's; a name
    in recipes/model/vision instead of the former stands for a tower that is trained from scratch.

    Raises:
        ValueError: one of them is of a kind that we do not have.
    """
    described = new_tower(vision) if is_recipe(vision) else _read_tower(vision)
    text = _from_dict(_read_json(language / "config.json"))
    return ModelConfig(
        name=name,
        vision=described,
        language=_language(text, f"{language}/config.json"),
        tokenizer=str(language),
    )


def _read_tower(vision: Path) -> VisionConfig:
    tower = _read_json(vision / "config.json")
    if tower.get("model_type") == QWEN_VL or (tower.get("model_type") == AIMV2_MODEL_TYPE and tower.get("is_native")):
        return tower_config(tower, f"{vision}/config.json")
    if tower.get("model_type") in WHOLE_MODELS:
        tower = tower.get("vision_config", tower)
        if tower.get("model_type") in WHOLE_MODELS:  # older files name the whole model here
            tower = {**tower, "model_type": f"{tower['model_type']}_vision_model"}
    if tower.get("model_type") == AIMV2_MODEL_TYPE:
        tower = {**tower, "use_head": False}  # no features come from it
    described = _vision(_from_dict(tower), f"{vision}/config.json")
    described.drop_class_token = class_tokens(described) > 0
    return described


def is_recipe(vision: Path) -> bool:
    """Whether this names a recipe, not a directory."""
    return not vision.is_dir() and str(vision) in recipes.choices("model/vision")


def new_tower(recipe: Path) -> VisionConfig:
    """The tower of a file in recipes/model/vision.

    Raises:
        ValueError: it is one that does not start from random weights.
    """
    from omegaconf import OmegaConf

    values = OmegaConf.load(recipes.find("model/vision", str(recipe))).model.vision
    described = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(VisionConfig), values))
    assert isinstance(described, VisionConfig)
    if FAMILIES[described.family].classes is not None:
        raise ValueError(f"vision={recipe} starts from published weights: give the directory they are in.")
    return described


# model_type: the architecture that config.json names
ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    SPATIAL: "SpatialLlavaForConditionalGeneration",
    QWEN_VL: "Qwen2_5_VLForConditionalGeneration",
    SPATIAL_QWEN_VL: "SpatialQwenVLForConditionalGeneration",
}


def hf_config(
    model: ModelConfig, image_token_id: int, max_positions: int, dtype: str, markers: tuple[int, int] | None = None
) -> dict[str, Any]:
    """``config.json`` of the exported directory: a plain LLaVA or Qwen2.5-VL, or our custom code's where attention or
    positions are not a plain one's.

    Args:
        image_token_id: stands for an image in the exported tokenizer.
        max_positions: for models that state none.
        dtype: of the exported weights, e.g. ``bfloat16``.
        markers: ids of the tokens around every image, where the chat template has some.

    Raises:
        ValueError: a model that cannot be exported.
    """
    text = _text_values(model.language, exported_vocab_size(model.language, image_token_id), max_positions)
    if is_native(model.vision):
        kind = QWEN_VL if is_plain(model, markers) else SPATIAL_QWEN_VL
        values = hf_values(model, text, image_token_id, markers)
    else:
        kind = SPATIAL if is_spatial(model) else "llava"
        values = _llava_values(model, text, image_token_id)
    config = _config_class(kind).from_dict(values)
    result = {**config.to_dict(), "architectures": [ARCHITECTURES[kind]], "dtype": dtype}
    if kind in (SPATIAL, SPATIAL_QWEN_VL):
        result["auto_map"] = {
            "AutoConfig": f"configuration_{kind}.{_config_class(kind).__name__}",
            "AutoModelForImageTextToText": f"modeling_{kind}.{ARCHITECTURES[kind]}",
            "AutoModelForVision2Seq": f"modeling_{kind}.{ARCHITECTURES[kind]}",
        }
    return result


def _llava_values(model: ModelConfig, text: dict[str, Any], image_token_id: int) -> dict[str, Any]:
    vision, language = model.vision, model.language
    side = vision.image_size // vision.patch_size
    values: dict[str, Any] = {
        "vision_config": {"model_type": FAMILIES[vision.family].model_type, **transformers_values(vision)},
        "text_config": text,
        "image_token_index": image_token_id,
        "image_seq_length": side * side + kept_class_tokens(vision),
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default" if vision.drop_class_token else "full",
        "tie_word_embeddings": language.tie_embeddings,
        **LLAVA_MUST,
    }
    if is_spatial(model):
        frequencies = language.hidden_size // language.num_attention_heads // 2
        axes = None if model.rope == "1d" else axis_of_frequency(model.rope, model.rope_sections, frequencies)
        values |= {
            "visual_attention": model.attention,
            "visual_rope": model.rope,
            "rope_axes": axes,
            "tile_grid": [side, side],
        }
    return values


def is_spatial(model: ModelConfig) -> bool:
    """Whether a model of fixed resolution needs our custom code at inference."""
    return model.attention != "causal" or model.rope != "1d" or FAMILIES[model.vision.family].classes is None


def exported_vocab_size(language: LanguageConfig, image_token_id: int) -> int:
    """The image's id needs a row of the embedding, although nobody reads it."""
    return max(language.vocab_size, image_token_id + 1)


def _text_values(language: LanguageConfig, vocab_size: int, max_positions: int) -> dict[str, Any]:
    scaling = language.rope_scaling
    rope_scaling: dict[str, Any] | None = None
    if scaling.kind != "none":
        rope_scaling = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope_scaling |= {  # type: ignore[operator]
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    return {
        "model_type": {ours: theirs for theirs, ours in LANGUAGE_FAMILIES.items()}[language.family],
        "vocab_size": vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "max_position_embeddings": language.max_position_embeddings or max_positions,
        "rms_norm_eps": language.layernorm_epsilon,
        "rope_theta": language.rotary_base,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": language.tie_embeddings,
        "hidden_act": "silu",
    }


def _language(text: Any, where: str) -> LanguageConfig:
    if text.model_type not in LANGUAGE_FAMILIES:
        raise ValueError(
            f"{where} has a language model of type {text.model_type}: only {', '.join(LANGUAGE_FAMILIES)} can be "
            f"imported."
        )
    require(where, text, LANGUAGE_MUST)
    width = text.hidden_size // text.num_attention_heads
    if (getattr(text, "head_dim", None) or width) != width:
        raise ValueError(f"{where} has head_dim={text.head_dim}: only hidden_size / num_attention_heads is imported.")
    return LanguageConfig(
        family=LANGUAGE_FAMILIES[text.model_type],
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        vocab_size=text.vocab_size,
        rotary_base=float(text.rope_theta),
        rope_scaling=_rope_scaling(text.rope_scaling, where),
        layernorm_epsilon=text.rms_norm_eps,
        tie_embeddings=bool(text.tie_word_embeddings),
        max_position_embeddings=text.max_position_embeddings,
    )


def _rope_scaling(values: dict[str, Any] | None, where: str) -> RopeScalingConfig:
    kind = (values or {}).get("rope_type", (values or {}).get("type", "default"))
    if values is None or kind == "default":
        return RopeScalingConfig()
    if kind == "linear":
        return RopeScalingConfig(kind="linear", factor=float(values["factor"]))
    if kind == "llama3":
        return RopeScalingConfig(
            kind="llama3",
            factor=float(values["factor"]),
            low_freq_factor=float(values["low_freq_factor"]),
            high_freq_factor=float(values["high_freq_factor"]),
            original_positions=int(values["original_max_position_embeddings"]),
        )
    raise ValueError(f"{where} has rope_scaling of type {kind}: only linear and llama3 are imported.")


def _vision(tower: Any, where: str) -> VisionConfig:
    if tower.model_type not in VISION_FAMILIES:
        raise ValueError(
            f"{where} has a vision tower of type {tower.model_type}: only {', '.join(VISION_FAMILIES)} can be "
            f"imported."
        )
    family = VISION_FAMILIES[tower.model_type]
    require(where, tower, FAMILIES[family].must)
    width = tower.hidden_size
    return VisionConfig(
        family=family,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        hidden_size=width,
        intermediate_size=width * tower.mlp_ratio if family == "dinov2" else tower.intermediate_size,
        num_layers=getattr(tower, "num_hidden_layers", 0),  # a patch MLP has neither
        num_attention_heads=getattr(tower, "num_attention_heads", 1),
    )


def _sections(axes: list[int] | None, model: ModelConfig) -> list[int] | None:
    """``rope_sections`` that give these axes; None if the default does.

    Raises:
        ValueError: no sections do.
    """
    frequencies = model.language.hidden_size // model.language.num_attention_heads // 2
    if axes is None or axes == axis_of_frequency(model.rope, None, frequencies):
        return None
    sections = [axes.count(axis) for axis in ((ROW, COLUMN) if model.rope == "2d" else (TIME, ROW, COLUMN))]
    if axis_of_frequency(model.rope, sections, frequencies) != axes:
        raise ValueError(f"rope_axes={axes} of {model.name} are no consecutive sections: only such are imported.")
    return sections


def _config_class(model_type: str) -> Any:
    if model_type == SPATIAL:
        from nemo_pre.huggingface.remote_code.configuration_spatial_llava import SpatialLlavaConfig

        return SpatialLlavaConfig
    if model_type == SPATIAL_QWEN_VL:
        from nemo_pre.huggingface.remote_code.configuration_spatial_qwen_vl import SpatialQwenVLConfig

        return SpatialQwenVLConfig
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def _from_dict(values: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type", "unknown")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"A model of type {kind} is not known to transformers: name another directory.")
    return CONFIG_MAPPING[kind].from_dict(values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: name a downloaded Hugging Face model.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return values
