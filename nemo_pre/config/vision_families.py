"""Families of vision towers: what their transformers' configurations must say, and how many tokens they give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_pre.config.schema import VisionConfig


@dataclass(frozen=True)
class VisionFamily:
    """What sets one family of vision towers apart.

    Attributes:
        title: for model cards.
        model_type: the name of the vision model in ``config.json``.
        class_tokens: tokens that are no patch's, before the patches.
        classes: ``transformers``' classes of model and configuration; None: ours, which travel with exported models.
        must: what our towers are, and nothing else: a configuration that says otherwise is refused.
        native: every image keeps its aspect ratio, and its number of visual tokens follows from its size.
        merge: patches that become one visual token along each side. Where they are several, the features are theirs
            side by side, and the projector is the merger's MLP.
    """

    title: str
    model_type: str
    class_tokens: int
    classes: tuple[str, str] | None = None
    must: dict[str, Any] = field(default_factory=dict)
    native: bool = False
    merge: int = 1


AIMV2_CLASSES = ("Aimv2VisionModel", "Aimv2VisionConfig")
AIMV2_MUST: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "num_channels": 3,
    "qkv_bias": False,
    "mlp_bias": False,
    "use_head": False,
}
FAMILIES = {
    "clip": VisionFamily(
        "CLIP",
        "clip_vision_model",
        1,
        ("CLIPVisionModel", "CLIPVisionConfig"),
        {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3},
    ),
    "siglip": VisionFamily(
        "SigLIP",
        "siglip_vision_model",
        0,
        ("SiglipVisionModel", "SiglipVisionConfig"),
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3},
    ),
    "dinov2": VisionFamily(
        "DINOv2",
        "dinov2",
        1,
        ("Dinov2Model", "Dinov2Config"),
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "num_channels": 3,
            "qkv_bias": True,
            "use_swiglu_ffn": False,
            "use_mask_token": True,
        },
    ),
    "aimv2": VisionFamily("AIMv2", "aimv2_vision_model", 0, AIMV2_CLASSES, {**AIMV2_MUST, "is_native": False}),
    "aimv2_native": VisionFamily(
        "AIMv2", "aimv2_vision_model", 0, AIMV2_CLASSES, {**AIMV2_MUST, "is_native": True}, native=True
    ),
    "qwen25_vl": VisionFamily(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        0,
        ("Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig"),
        {"hidden_act": "silu", "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2},
        native=True,
        merge=2,
    ),
    "patch_mlp": VisionFamily("patch MLP", "patch_mlp", 0),
}


def is_native(vision: VisionConfig) -> bool:
    """Whether images keep their aspect ratio and differ in their number of visual tokens."""
    return FAMILIES[vision.family].native


def merge_size(vision: VisionConfig) -> int:
    """Patches that become one visual token along each side."""
    return FAMILIES[vision.family].merge


def token_pixels(vision: VisionConfig) -> int:
    """The side of the square of pixels that becomes one visual token."""
    return merge_size(vision) * vision.patch_size


def feature_width(vision: VisionConfig) -> int:
    """Width of what the projector takes: the patches of a visual token side by side."""
    return vision.hidden_size * merge_size(vision) ** 2


def most_visual_tokens(vision: VisionConfig) -> int:
    """Visual tokens of a tile in the decoder's sequence; with native resolution the most an image may have."""
    if is_native(vision):
        assert vision.max_visual_tokens is not None
        return vision.max_visual_tokens
    return (vision.image_size // vision.patch_size) ** 2 + kept_class_tokens(vision)


def class_tokens(vision: VisionConfig) -> int:
    """Tokens of the tower that are no patch's."""
    return FAMILIES[vision.family].class_tokens


def kept_class_tokens(vision: VisionConfig) -> int:
    """Class tokens that the language model sees too."""
    return 0 if vision.drop_class_token else class_tokens(vision)


def encoder_tokens(vision: VisionConfig) -> int:
    """Tokens of a tile in the tower; with native resolution of the largest image."""
    if is_native(vision):
        return merge_size(vision) ** 2 * most_visual_tokens(vision)
    return (vision.image_size // vision.patch_size) ** 2 + class_tokens(vision)


def transformers_values(vision: VisionConfig) -> dict[str, Any]:
    """The keyword arguments of the family's configuration in ``config.json``."""
    width, inner = vision.hidden_size, vision.intermediate_size
    if vision.family == "patch_mlp":
        sizes = {"intermediate_size": inner, "hidden_size": width}
        return {"image_size": vision.image_size, "patch_size": vision.patch_size, **sizes}
    if vision.family == "qwen25_vl":
        return {
            "patch_size": vision.patch_size,
            "hidden_size": width,
            "intermediate_size": inner,
            "depth": vision.num_layers,
            "num_heads": vision.num_attention_heads,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.full_attention_layers or []),
            **FAMILIES[vision.family].must,
        }
    return {
        **({} if is_native(vision) else {"image_size": vision.image_size}),
        "patch_size": vision.patch_size,
        "hidden_size": width,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        **({"mlp_ratio": inner // width} if vision.family == "dinov2" else {"intermediate_size": inner}),
        **({} if vision.pooling_head else {"vision_use_head": False}),
        **FAMILIES[vision.family].must,
    }
