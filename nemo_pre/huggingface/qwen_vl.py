"""A Qwen2.5-VL's ``config.json`` as our model configuration, and where the tensors of its files belong.

Its merger is cut in two: the norm ends our tower, the MLP is our projector (:mod:`nemo_pre.neva.native_vision`).
"""

from __future__ import annotations

from typing import Any

from nemo_pre.config.schema import VisionConfig
from nemo_pre.config.vision_families import FAMILIES, token_pixels

QWEN_VL = "qwen2_5_vl"  # model_type of the whole and of its vision tower alike
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


def refuse_export(vision: VisionConfig) -> None:
    """Raises:
    ValueError: the model has native resolution.
    """
    if FAMILIES[vision.family].native:
        raise ValueError(
            f"Export of native-resolution models (model.vision.family={vision.family}) is not supported yet: ask the "
            f"checkpoint itself with nemo-pre generate."
        )


def llava_name(name: str) -> str:
    """A Qwen2.5-VL's tensor under the name that a LLaVA would have for it."""
    name = next((new + name.removeprefix(old) for old, new in HUB_NAMES.items() if name.startswith(old)), name)
    return projector_name(name) or name


def projector_name(name: str) -> str | None:
    """The projector's name of a tensor of the merger's MLP; None for others."""
    _, is_merger, rest = name.partition(MERGER)
    layer, _, kind = rest.partition(".")
    return f"multi_modal_projector.{PROJECTOR_NAMES[layer]}.{kind}" if is_merger else None


def tower_config(values: dict[str, Any], processor: dict[str, Any], where: str) -> VisionConfig:
    """Our configuration of a tower.

    Args:
        values: ``config.json`` of the tower, or of a whole Qwen2.5-VL.
        processor: ``preprocessor_config.json``, or nothing.

    Raises:
        ValueError: it is none that we have.
    """
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    given = values.get("vision_config", values)
    tower = Qwen2_5_VLVisionConfig.from_dict({**given, "in_channels": given.get("in_chans", 3)})
    for name, value in FAMILIES["qwen25_vl"].must.items():
        if getattr(tower, name) != value:
            raise ValueError(f"{where} has {name}={getattr(tower, name)}: only {name}={value} is imported.")
    described = VisionConfig(
        family="qwen25_vl",
        image_size=0,
        patch_size=tower.patch_size,
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_layers=tower.depth,
        num_attention_heads=tower.num_heads,
        feature_layer=-1,
        drop_class_token=False,
        window_size=tower.window_size,
        full_attention_layers=list(tower.fullatt_block_indexes),
    )
    size = processor.get("size") or {}
    pixels = token_pixels(described) ** 2
    described.min_visual_tokens = (processor.get("min_pixels") or size.get("shortest_edge") or 4 * pixels) // pixels
    described.max_visual_tokens = (processor.get("max_pixels") or size.get("longest_edge") or 1280 * pixels) // pixels
    return described


def text_config(values: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The language model of a whole Qwen2.5-VL as a Qwen2's ``config.json``, and the sections of its M-RoPE."""
    text = {**values, **values.get("text_config", {})}
    scaling = text.get("rope_scaling") or {}
    if scaling.get("type", scaling.get("rope_type")) not in ("mrope", "default") or "mrope_section" not in scaling:
        raise ValueError(f"rope_scaling={scaling} is no Qwen2.5-VL's: only type=mrope with mrope_section is imported.")
    tied = values.get("tie_word_embeddings", False)  # the part's own says nothing
    whole = {**text, "model_type": "qwen2", "rope_scaling": None, "tie_word_embeddings": tied}
    return whole, list(scaling["mrope_section"])
