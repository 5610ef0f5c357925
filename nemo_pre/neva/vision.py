"""Vision towers: ``transformers`` models with random weights; a checkpoint brings others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

FAMILIES = ("clip", "siglip")


@dataclass
class VisionTowerConfig:
    """A ``transformers`` vision tower, in the form NeVA expects of its ``vision_transformer_config``.

    Attributes:
        family: ``clip`` (one class token) or ``siglip`` (none).
        seed: seed of the random weights, the same in every layout.
        image_size, patch_size: pixels.
        image_mean, image_std: how the data loader normalises pixels in [0, 1].
    """

    family: str
    seed: int
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    image_mean: list[float]
    image_std: list[float]
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1

    @property
    def add_class_token(self) -> bool:
        return self.family == "clip"

    @property
    def class_token_len(self) -> int:
        return 1 if self.add_class_token else 0

    @property
    def num_image_embeddings_per_tile(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + self.class_token_len

    def configure_model(self) -> nn.Module:
        from nemo_pre.neva.seeding import seeded

        model_class, config_class = _classes(self.family)
        config = config_class(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
        )
        with seeded(self.seed, "vision_model"):
            model = model_class(config)
        model.set_input_tensor = _receive_nothing
        return model


def _receive_nothing(_: object) -> None:
    """Pipeline schedules offer every stage an input; the tower is on the first stage and has none."""


def _classes(family: str) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    if family == "clip":
        return CLIPVisionModel, CLIPVisionConfig
    if family == "siglip":
        return SiglipVisionModel, SiglipVisionConfig
    raise ValueError(f"model.vision.family is '{family}': choose one of {', '.join(FAMILIES)}.")


def freeze_unused_layers(vision_model: nn.Module, feature_layer: int) -> None:
    """Freeze what lies behind the feature layer: it gets no gradient, and Megatron's overlapped gradient
    reduction waits for ever for a parameter that is trainable but unused."""
    tower = getattr(vision_model, "vision_model", vision_model)
    layers = tower.encoder.layers
    last_used = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
    unused = [layers[last_used:], getattr(tower, "post_layernorm", None), getattr(tower, "head", None)]
    for module in unused:
        if module is not None:
            module.requires_grad_(False)
