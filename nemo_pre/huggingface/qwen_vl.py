"""A Qwen2.5-VL's ``config.json`` as our model configuration and back, and where the tensors of its files belong.

Its merger is cut in two: the norm ends our tower, the MLP is our projector (:mod:`nemo_pre.neva.native_qwen_vl`).
AIMv2 at native resolution is exported as a Qwen2.5-VL with another tower, and its projector as the merger's MLP.
"""

from __future__ import annotations

from typing import Any

from nemo_pre.config.derived import axis_of_frequency
from nemo_pre.config.schema import ModelConfig, VisionConfig
from nemo_pre.config.vision_families import FAMILIES, transformers_values
from nemo_pre.huggingface.config_fields import OBJECT, Only, Read, read_fields, short
from nemo_pre.huggingface.config_tables import QWEN_VL_TEXT, TOWERS

SPATIAL_QWEN_VL = "spatial_qwen_vl"  # our custom code's model_type, see remote_code/
QWEN_VL = "qwen2_5_vl"  # model_type of the whole, and of its vision tower alike in transformers 4
QWEN_VL_TOWER_TYPES = (QWEN_VL, "qwen2_5_vl_vision")  # the latter from transformers 5 on
AIMV2_MODEL_TYPE = FAMILIES["aimv2_native"].model_type
_OF_THE_WHOLE = ("model_type", "tie_word_embeddings")  # which text_config has of its own
MERGER = "merger.mlp."
# In files on the hub, and in those that newer transformers write.
HUB_NAMES = {
    "model.visual.": "vision_tower.",
    "visual.": "vision_tower.",
    "model.language_model.": "language_model.model.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
PROJECTOR_NAMES = {"0": "linear_1", "2": "linear_2"}
EXPORTED_PROJECTOR = {
    f"multi_modal_projector.{ours}.": f"visual.{MERGER}{theirs}." for theirs, ours in PROJECTOR_NAMES.items()
}
EXPORTED_NAMES = {
    "vision_tower.": "visual.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


def is_plain(model: ModelConfig, markers: tuple[int, int] | None) -> bool:
    """Whether ``transformers``' own Qwen2.5-VL computes what this model does: it finds images by the markers."""
    same_tower = model.vision.family == "qwen25_vl"
    return same_tower and model.attention == "causal" and model.rope == "mrope" and markers is not None


def hf_values(
    model: ModelConfig, text: dict[str, Any], image_token_id: int, markers: tuple[int, int] | None
) -> dict[str, Any]:
    """``config.json``, without the class's defaults.

    Args:
        text: of the language model by itself.
        markers: see :class:`nemo_pre.huggingface.processor.ImageTokens`.

    Raises:
        ValueError: a language model that no Qwen2.5-VL has.
    """
    if model.language.family != "qwen2" or text["rope_scaling"] is not None:
        raise ValueError(
            f"A model with native resolution is exported with a Qwen2 without rope scaling as its language model, "
            f"which {model.name} has not: ask the checkpoint itself with nemo-pre generate."
        )
    frequencies = model.language.hidden_size // model.language.num_attention_heads // 2
    axes = axis_of_frequency(model.rope, model.rope_sections, frequencies)
    sections = [axes.count(axis) for axis in range(3)]
    values: dict[str, Any] = {
        "vision_config": _vision_values(model),
        "text_config": {
            **text,
            "model_type": f"{QWEN_VL}_text",
            "rope_scaling": {"type": "mrope", "mrope_section": sections},
        },
        "image_token_id": image_token_id,
        # None, where there are none, and not the class's default.
        "vision_start_token_id": None if markers is None else markers[0],
        "vision_end_token_id": None if markers is None else markers[1],
        "tie_word_embeddings": model.language.tie_embeddings,
    }
    if not is_plain(model, markers):
        values |= {
            "visual_attention": model.attention,
            "visual_rope": model.rope,
            "rope_axes": None if model.rope == "1d" else axes,
        }
    return values


def _vision_values(model: ModelConfig) -> dict[str, Any]:
    values = {**transformers_values(model.vision), "out_hidden_size": model.language.hidden_size}
    if model.vision.family == "qwen25_vl":
        return {**values, "tokens_per_second": 2}  # the published one's, for videos
    return {
        **values,
        "model_type": AIMV2_MODEL_TYPE,
        "feature_layer": model.vision.feature_layer,
        "spatial_merge_size": 1,
    }


def qwen_vl_name(name: str) -> str:
    """A LLaVA's tensor under the name that files of a Qwen2.5-VL on the hub have."""
    for ours, theirs in (*EXPORTED_PROJECTOR.items(), *EXPORTED_NAMES.items()):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def llava_name(name: str) -> str:
    """A Qwen2.5-VL's tensor under the name that a LLaVA would have for it."""
    name = next((new + name.removeprefix(old) for old, new in HUB_NAMES.items() if name.startswith(old)), name)
    return projector_name(name) or name


def projector_name(name: str) -> str | None:
    """The projector's name of a tensor of the merger's MLP; None for others."""
    _, is_merger, rest = name.partition(MERGER)
    layer, _, kind = rest.partition(".")
    return f"multi_modal_projector.{PROJECTOR_NAMES[layer]}.{kind}" if is_merger else None


def tower_config(values: dict[str, Any], where: str) -> VisionConfig:
    """Our configuration of a tower of native resolution, with the limits that it has where its processor says none.

    Args:
        values: ``config.json`` of the tower, or of a whole Qwen2.5-VL.

    Raises:
        ValueError: it is none that we have.
    """
    given = values
    if "vision_config" in values:
        given, where = values["vision_config"], f"{where}: vision_config"
        if not OBJECT.accepts(given):
            raise ValueError(f"{where} must be {OBJECT.words}.")
    is_aimv2 = given.get("model_type") == AIMV2_MODEL_TYPE
    described = _aimv2(given, where) if is_aimv2 else _qwen_vl(given, where)
    described.min_visual_tokens, described.max_visual_tokens = 16 if is_aimv2 else 4, 1280
    return described


def _qwen_vl(values: dict[str, Any], where: str) -> VisionConfig:
    if values.get("model_type", QWEN_VL) not in QWEN_VL_TOWER_TYPES:
        raise ValueError(
            f"{where} has a vision tower of type {short(values['model_type'])}: only {', '.join(QWEN_VL_TOWER_TYPES)} "
            f"can be imported here."
        )
    tower = read_fields(values, TOWERS["qwen25_vl"], where)
    return VisionConfig(
        family="qwen25_vl",
        image_size=0,
        patch_size=tower["patch_size"],
        hidden_size=tower["hidden_size"],
        intermediate_size=tower["intermediate_size"],
        num_layers=tower["depth"],
        num_attention_heads=tower["num_heads"],
        feature_layer=-1,
        drop_class_token=False,
        window_size=tower["window_size"],
        full_attention_layers=list(tower["fullatt_block_indexes"]),
    )


def _aimv2(values: dict[str, Any], where: str) -> VisionConfig:
    tower = read_fields(values, TOWERS["aimv2"], where)
    if not tower["is_native"]:
        raise ValueError(f"{where} has is_native=False: only is_native=True is imported here.")
    return VisionConfig(
        family="aimv2_native",
        image_size=0,
        patch_size=tower["patch_size"],
        hidden_size=tower["hidden_size"],
        intermediate_size=tower["intermediate_size"],
        num_layers=tower["num_hidden_layers"],
        num_attention_heads=tower["num_attention_heads"],
        feature_layer=tower["feature_layer"],
        drop_class_token=False,
    )


def text_values(values: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The text model's fields in a whole Qwen2.5-VL's ``config.json``, and where they are: beside the tower's, as on
    the hub, or in a part of their own.

    Raises:
        ValueError: they are in both places, and differ.
    """
    flat = {name: value for name, value in values.items() if name in QWEN_VL_TEXT and name not in _OF_THE_WHOLE}
    part = values.get("text_config")
    if part is None:
        return flat, where
    for name, value in flat.items():
        if name in part and part[name] != value and isinstance(QWEN_VL_TEXT[name], Read | Only):
            raise ValueError(
                f"{where} has {name}={short(value)}, but text_config says {short(part[name])}: remove what is wrong."
            )
    return part, f"{where}: text_config"
