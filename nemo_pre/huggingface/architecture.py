"""A LLaVA's ``config.json`` as our model configuration and back, and what of it we cannot build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import recipes
from nemo_pre.config.derived import COLUMN, ROW, TIME, axis_of_frequency
from nemo_pre.config.schema import LanguageConfig, ModelConfig, VisionConfig
from nemo_pre.config.vision_families import FAMILIES, class_tokens, is_native, kept_class_tokens, transformers_values
from nemo_pre.huggingface.config_fields import read_fields, read_json, short
from nemo_pre.huggingface.config_tables import (
    LLAMA,
    LLAVA,
    QWEN2,
    QWEN_VL_FLAT,
    QWEN_VL_TEXT,
    SPATIAL_LLAVA,
    SPATIAL_QWEN_VL_FLAT,
    TOWERS,
    WHOLE_TOWER,
)
from nemo_pre.huggingface.qwen_vl import (
    AIMV2_MODEL_TYPE,
    QWEN_VL,
    QWEN_VL_TOWER_TYPES,
    SPATIAL_QWEN_VL,
    hf_values,
    is_plain,
    text_values,
    tower_config,
)
from nemo_pre.huggingface.rope_fields import read_rope

LLAVA_TYPE = "llava"
SPATIAL = "spatial_llava"  # our custom code's model_type, see remote_code/
NATIVE_WHOLE = (QWEN_VL, SPATIAL_QWEN_VL)
LANGUAGE_FAMILIES = {"llama": "llama", "qwen2": "qwen2"}  # transformers' model_type: ours
VISION_FAMILIES = {family.model_type: name for name, family in FAMILIES.items() if not family.native}
WHOLE_MODELS = ("clip", "siglip")  # whose files name the vision tower's weights as the tower's own files do
LLAVA_MUST = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}


def read_whole(directory: Path) -> ModelConfig:
    """The model of a LLaVA's or a Qwen2.5-VL's directory, or of one that we exported.

    Raises:
        ValueError: neither, or one with a part that we do not have.
    """
    values = read_json(directory / "config.json")
    return _read_qwen_vl(directory, values) if _model_type(values) in NATIVE_WHOLE else read_llava(directory)


def _model_type(values: dict[str, Any]) -> str:
    return str(values.get("model_type"))


def _read_qwen_vl(directory: Path, values: dict[str, Any]) -> ModelConfig:
    where = f"{directory}/config.json"
    spatial = _model_type(values) == SPATIAL_QWEN_VL
    whole = read_fields(values, SPATIAL_QWEN_VL_FLAT if spatial else QWEN_VL_FLAT, where)
    text, inside = text_values(values, where)
    fields = read_fields(text, QWEN_VL_TEXT, inside)
    language, sections = _language(fields, "qwen2", _tied(where, whole, text), inside, mrope=True)
    model = ModelConfig(
        name=directory.resolve().name,
        vision=tower_config(values, where),
        language=language,
        rope="mrope",
        tokenizer=str(directory),
    )
    if _model_type(text) not in ("None", QWEN_VL, f"{QWEN_VL}_text", SPATIAL_QWEN_VL):
        raise ValueError(
            f"{inside} has a language model of type {_model_type(text)}: only a Qwen2.5-VL's is imported."
        )
    if sections is None:
        raise ValueError(f"{inside} has no mrope_section: only type=mrope with mrope_section is imported.")
    if len(sections) != 3 or sum(sections) != _frequencies(language):
        raise ValueError(
            f"{inside} has mrope_section={sections}: it must be three numbers whose sum is {_frequencies(language)}, "
            f"the frequencies of an attention head."
        )
    axes: list[int] | None = [axis for axis, size in enumerate(sections) for _ in range(size)]
    if spatial:
        axes = _spatial(model, whole, where)
    model.rope_sections = _sections(axes, model)
    return model


def _spatial(model: ModelConfig, whole: dict[str, Any], where: str) -> list[int] | None:
    """Take over what our custom code has beside a LLaVA or Qwen2.5-VL; returns the axes of its frequencies."""
    model.attention, model.rope = whole["visual_attention"], whole["visual_rope"]
    axes: list[int] | None = whole["rope_axes"]
    wanted = 0 if model.rope == "1d" else _frequencies(model.language)
    if len(axes or []) != wanted or any(axis > COLUMN for axis in axes or []):
        raise ValueError(
            f"{where} has rope_axes={short(axes)}: visual_rope={model.rope} needs {wanted} numbers of 0 (time), "
            f"1 (row) or 2 (column)."
        )
    return axes or None


def read_llava(directory: Path) -> ModelConfig:
    """The model of a LLaVA's directory.

    Raises:
        ValueError: not a LLaVA, or one with a part that we do not have.
    """
    values = read_json(directory / "config.json")
    where = f"{directory}/config.json"
    if _model_type(values) not in (LLAVA_TYPE, SPATIAL):
        raise ValueError(
            f"{where} has model_type={short(values.get('model_type'))}: only {', '.join(ARCHITECTURES)} are imported."
        )
    whole = read_fields(values, SPATIAL_LLAVA if _model_type(values) == SPATIAL else LLAVA, where)
    if whole["image_token_index"] is None and whole["image_token_id"] is None:
        raise ValueError(f"{where} has no image_token_index, which must be the id that stands for an image.")
    vision = _vision(whole["vision_config"], f"{where}: vision_config")
    vision.feature_layer = whole["vision_feature_layer"]
    vision.drop_class_token = whole["vision_feature_select_strategy"] == "default"
    if vision.drop_class_token and not class_tokens(vision):
        raise ValueError(
            f"{where} has vision_feature_select_strategy=default with a tower that has no class token, which would "
            f"drop a patch: it must be full."
        )
    text, inside = whole["text_config"], f"{where}: text_config"
    kind = text.get("model_type", "llama")
    language, _ = _language(_text_fields(text, kind, inside), kind, _tied(where, whole, text), inside)
    model = ModelConfig(
        name=directory.resolve().name,
        vision=vision,
        language=language,
        tokenizer=str(directory),
    )
    if _model_type(values) == SPATIAL:
        axes = _spatial(model, whole, where)
        side = vision.image_size // vision.patch_size
        if whole["tile_grid"] != [side, side]:
            raise ValueError(
                f"{where} has tile_grid={short(whole['tile_grid'])}: its tower makes it [{side}, {side}]."
            )
        model.rope_sections = _sections(axes, model)
    return model


def read_parts(vision: Path, language: Path, name: str) -> ModelConfig:
    """A fresh VLM from a vision tower's directory (or that of a whole CLIP, SigLIP, LLaVA or Qwen2.5-VL) and a
    language model's; a name in recipes/model/vision instead of the former stands for a tower that is trained from
    scratch.

    Raises:
        ValueError: one of them is of a kind that we do not have.
    """
    described = new_tower(vision) if is_recipe(vision) else read_tower(vision)
    where = f"{language}/config.json"
    text = read_json(language / "config.json")
    kind = _model_type(text)
    fields = _text_fields(text, kind, where)
    return ModelConfig(
        name=name,
        vision=described,
        language=_language(fields, kind, bool(fields["tie_word_embeddings"]), where)[0],
        tokenizer=str(language),
    )


def read_tower(vision: Path) -> VisionConfig:
    """The tower that the ``config.json`` of a directory describes, which may be that of a whole model with one.

    Raises:
        ValueError: it is of a kind that we do not have.
    """
    values = read_json(vision / "config.json")
    where = f"{vision}/config.json"
    kind = _model_type(values)
    if kind in (*NATIVE_WHOLE, *QWEN_VL_TOWER_TYPES) or (kind == AIMV2_MODEL_TYPE and values.get("is_native") is True):
        return tower_config(values, where)
    if kind in (LLAVA_TYPE, SPATIAL):
        values = read_fields(values, SPATIAL_LLAVA if kind == SPATIAL else LLAVA, where)["vision_config"]
        where = f"{where}: vision_config"
    elif kind in WHOLE_MODELS and "vision_config" in values:
        whole = read_fields(values, WHOLE_TOWER, where)
        values, older = whole["vision_config"], whole["vision_config_dict"] or {}
        where = f"{where}: vision_config"
        for name, value in older.items():
            if name in values and values[name] != value:
                raise ValueError(
                    f"{where} has {name}={short(values[name])}, but vision_config_dict says {short(value)}: remove "
                    f"what is wrong."
                )
        values = {**older, **values}
        kind = f"{kind}_vision_model"
    if "model_type" not in values or _model_type(values) in WHOLE_MODELS:  # older files name the whole model here
        values = {**values, "model_type": f"{kind.removesuffix('_vision_model')}_vision_model"}
    described = _vision(values, where)
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


OLDER_NAMES = ("rope_theta", "rope_scaling")


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
    if "text_config" in result:  # transformers 5 has other names, of which 4 knows none: it would take defaults
        result["text_config"] = {name: text[name] for name in OLDER_NAMES if name in text} | result["text_config"]
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


def _text_fields(text: dict[str, Any], kind: object, where: str) -> dict[str, Any]:
    """The fields of a Llama's or a Qwen2's ``config.json``."""
    if not isinstance(kind, str) or kind not in LANGUAGE_FAMILIES:
        raise ValueError(
            f"{where} has a language model of type {short(kind)}: only {', '.join(LANGUAGE_FAMILIES)} can be imported."
        )
    return read_fields(text, LLAMA if kind == "llama" else QWEN2, where)


def _tied(where: str, whole: dict[str, Any], text: dict[str, Any]) -> bool:
    """Whether the output layer is the embedding, which transformers 4 asks the text model's part, and 5 the whole."""
    said = {part.get("tie_word_embeddings") for part in (whole, text)} - {None}
    if len(said) > 1:
        raise ValueError(
            f"{where} has tie_word_embeddings={whole['tie_word_embeddings']}, but another value in text_config: make "
            f"them one."
        )
    return bool(said and said.pop())


def _language(
    fields: dict[str, Any], kind: str, tied: bool, where: str, mrope: bool = False
) -> tuple[LanguageConfig, list[int] | None]:
    """Our description of a text model, and the sections of its M-RoPE."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    groups = heads if fields["num_key_value_heads"] is None else fields["num_key_value_heads"]
    if width % (2 * heads):
        raise ValueError(
            f"{where} has hidden_size={width}: it must be a multiple of twice num_attention_heads={heads}."
        )
    if heads % groups:
        raise ValueError(f"{where} has num_key_value_heads={groups}: num_attention_heads={heads} must be a multiple.")
    if fields["head_dim"] not in (None, width // heads):
        raise ValueError(
            f"{where} has head_dim={fields['head_dim']}: only hidden_size / num_attention_heads is imported."
        )
    rope = read_rope(fields, 1e6 if mrope else 1e4, where, mrope)  # as transformers' classes have it
    if rope.sections is not None and not mrope:
        raise ValueError(f"{where} has mrope_section={rope.sections}, which is a Qwen2.5-VL's: only that is imported.")
    assert rope.base is not None
    described = LanguageConfig(
        family=LANGUAGE_FAMILIES.get(kind, kind),
        num_layers=fields["num_hidden_layers"],
        hidden_size=width,
        ffn_hidden_size=fields["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=fields["vocab_size"],
        rotary_base=float(rope.base),
        rope_scaling=rope.scaling,
        layernorm_epsilon=float(fields["rms_norm_eps"]),
        tie_embeddings=tied,
        max_position_embeddings=fields["max_position_embeddings"],
    )
    return described, rope.sections


def _frequencies(language: LanguageConfig) -> int:
    """Rotary frequencies of an attention head."""
    return language.hidden_size // language.num_attention_heads // 2


def _vision(values: dict[str, Any], where: str) -> VisionConfig:
    kind = values.get("model_type", "clip_vision_model")  # as transformers takes it
    if not isinstance(kind, str) or kind not in VISION_FAMILIES:
        raise ValueError(
            f"{where} has a vision tower of type {short(kind)}: only {', '.join(VISION_FAMILIES)} can be imported."
        )
    family = VISION_FAMILIES[kind]
    tower = read_fields(values, TOWERS[family], where)
    if tower.get("is_native"):
        raise ValueError(f"{where} has is_native=True: only is_native=False is imported here.")
    width, heads = tower["hidden_size"], tower.get("num_attention_heads", 1)  # a patch MLP has neither
    if width % heads:
        raise ValueError(f"{where} has hidden_size={width}: it must be a multiple of num_attention_heads={heads}.")
    if family == "dinov2" and width * tower["mlp_ratio"] % width:
        raise ValueError(f"{where} has mlp_ratio={tower['mlp_ratio']}: only whole numbers are imported.")
    described = VisionConfig(
        family=family,
        image_size=tower["image_size"],
        patch_size=tower["patch_size"],
        hidden_size=width,
        intermediate_size=int(width * tower["mlp_ratio"]) if family == "dinov2" else tower["intermediate_size"],
        num_layers=tower.get("num_hidden_layers", 0),
        num_attention_heads=heads,
        pooling_head=tower.get("vision_use_head", True),
    )
    if family == "patch_mlp":
        described.feature_layer = -1
    return described


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
