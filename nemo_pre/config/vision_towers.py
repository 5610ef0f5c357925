"""What no vision tower can look like, whatever the run: of a recipe, and of a published model's configuration."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_pre.config.schema import VisionConfig
from nemo_pre.config.vision_families import class_tokens, is_native, token_pixels

LIMITS = ("min_visual_tokens", "max_visual_tokens")
WINDOWS = ("window_size", "full_attention_layers")


def tower_problems(vision: VisionConfig) -> Iterator[str]:
    """What no vision tower can look like."""
    least = 0 if vision.family == "patch_mlp" else 1
    if vision.num_layers < least:
        yield f"model.vision.num_layers={vision.num_layers} must be {least} or more."
    if vision.family == "patch_mlp" and (vision.num_layers, vision.feature_layer) != (0, -1):
        yield "model.vision.family=patch_mlp has no layers: set model.vision.num_layers=0 and feature_layer=-1."
    if is_native(vision):
        yield from _native_problems(vision)
    elif vision.image_size < 1:
        yield f"model.vision.image_size={vision.image_size} must be 1 or more."
    elif any(getattr(vision, name) is not None for name in LIMITS):
        yield f"model.vision.{', '.join(LIMITS)} are of native resolution: set them to null for {vision.family}."
    if vision.family == "qwen25_vl":
        yield from _window_problems(vision)
    elif any(getattr(vision, name) is not None for name in WINDOWS):
        yield f"model.vision.{', '.join(WINDOWS)} are of qwen25_vl: set them to null for {vision.family}."
    if vision.image_size % vision.patch_size:
        yield (
            f"model.vision.image_size={vision.image_size} must be a multiple of "
            f"model.vision.patch_size={vision.patch_size}."
        )
    if not -vision.num_layers - 1 <= vision.feature_layer <= vision.num_layers:
        yield (
            f"model.vision.feature_layer={vision.feature_layer} does not exist: a tower of {vision.num_layers} layers "
            f"has {-vision.num_layers - 1} to {vision.num_layers}."
        )
    if vision.drop_class_token and not class_tokens(vision):
        yield (f"model.vision.family={vision.family} has no class token: set model.vision.drop_class_token=false.")
    if not vision.pooling_head and vision.family != "siglip":
        yield f"model.vision.pooling_head is of siglip: set it to true for {vision.family}."
    if vision.family == "dinov2" and vision.intermediate_size % vision.hidden_size:
        yield (
            f"model.vision.intermediate_size={vision.intermediate_size} must be a multiple of "
            f"model.vision.hidden_size={vision.hidden_size} for model.vision.family=dinov2."
        )
    if len(vision.image_mean) != 3 or len(vision.image_std) != 3 or not all(std > 0 for std in vision.image_std):
        yield "model.vision.image_mean and image_std need three numbers each, the latter more than 0."


def _native_problems(vision: VisionConfig) -> Iterator[str]:
    """What no tower of native resolution can look like."""
    if vision.image_size != 0:
        yield f"model.vision.family={vision.family} keeps the size of images: set model.vision.image_size=0."
    for name in LIMITS:
        if getattr(vision, name) is None:
            yield f"model.vision.family={vision.family} needs model.vision.{name}: set it."
    least, most = vision.min_visual_tokens, vision.max_visual_tokens
    assert least is not None and most is not None
    if least < 1 or most < 4 * least:
        yield (
            f"model.vision.max_visual_tokens={most} must be at least four times "
            f"model.vision.min_visual_tokens={least}, which must be 1 or more: sides are rounded to "
            f"{token_pixels(vision)} pixels."
        )
    if vision.family == "aimv2_native" and vision.hidden_size % 4:
        yield (
            f"model.vision.hidden_size={vision.hidden_size} must be a multiple of 4: AIMv2's positions are sines and "
            f"cosines of rows and columns."
        )


def _window_problems(vision: VisionConfig) -> Iterator[str]:
    """What cannot be Qwen2.5-VL's tower, most of whose layers attend within windows."""
    if vision.feature_layer != -1:
        yield f"model.vision.family={vision.family} gives its last layer's features: set feature_layer=-1."
    for name in WINDOWS:
        if getattr(vision, name) is None:
            yield f"model.vision.family={vision.family} needs model.vision.{name}: set it."
    window, layers = vision.window_size, vision.full_attention_layers
    assert window is not None and layers is not None
    if window < 1 or window % token_pixels(vision):
        yield f"model.vision.window_size={window} must be a multiple of {token_pixels(vision)} pixels, a visual token."
    if len(set(layers)) < len(layers) or not all(0 <= layer < vision.num_layers for layer in layers):
        yield (
            f"model.vision.full_attention_layers={list(layers)} must name different layers between 0 and "
            f"{vision.num_layers - 1}."
        )
    if vision.hidden_size % (4 * vision.num_attention_heads):
        yield (
            f"model.vision.hidden_size={vision.hidden_size} must be a multiple of four times "
            f"model.vision.num_attention_heads={vision.num_attention_heads}: its positions turn rows and columns."
        )
