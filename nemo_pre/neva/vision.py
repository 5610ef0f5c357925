"""Vision towers: ``transformers`` models, or an MLP on patches, with random weights; a checkpoint brings others."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from nemo_pre.config.schema import VisionConfig
from nemo_pre.config.vision_families import (
    FAMILIES,
    class_tokens,
    encoder_tokens,
    is_native,
    most_visual_tokens,
    transformers_values,
)
from nemo_pre.neva.stored_tower import StoredTower

WITH_INNER_MODEL = ("clip", "siglip")  # of transformers 4: the tower's weights are those of its vision_model
# Parts of towers that the features of a layer do not depend on: what lies behind all layers, and masking's token.
BESIDE_LAYERS = ("post_layernorm", "layernorm", "rms_norm", "head", "embeddings.mask_token")


@dataclass
class VisionTowerConfig:
    """A vision tower, in the form NeVA expects of its ``vision_transformer_config``.

    Attributes:
        vision: family and shape.
        seed: seed of the random weights, the same in every layout.
        stored: safetensors with the weights of a tower that is not run; its features are read.
        start: directory of the tower whose weights it starts with; None: random ones.
    """

    vision: VisionConfig
    seed: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    stored: str | None = None
    start: str | None = None

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def patch_size(self) -> int:
        return self.vision.patch_size

    @property
    def hidden_size(self) -> int:
        return self.vision.hidden_size

    @property
    def native(self) -> bool:
        """Whether images differ in their number of visual tokens."""
        return is_native(self.vision)

    @property
    def image_mean(self) -> list[float]:
        return self.vision.image_mean

    @property
    def image_std(self) -> list[float]:
        return self.vision.image_std

    @property
    def add_class_token(self) -> bool:
        return self.class_token_len > 0

    @property
    def class_token_len(self) -> int:
        return class_tokens(self.vision)

    @property
    def num_image_embeddings_per_tile(self) -> int:
        return most_visual_tokens(self.vision) if self.native else encoder_tokens(self.vision)

    def blank_image(self, device: torch.device) -> tuple[Tensor, list[tuple[int, int]] | None]:
        """The smallest input of the tower, of zeros; with native resolution its grid of visual tokens."""
        if not self.native:
            return torch.zeros(1, 3, self.image_size, self.image_size, device=device), None
        patches = FAMILIES[self.vision.family].merge ** 2
        return torch.zeros(4, patches, 3 * self.patch_size**2, device=device), [(2, 2)]

    def configure_model(self) -> nn.Module:
        from nemo_pre.parallel.seeding import seeded

        with seeded(self.seed, "vision_model"):
            model = _tower(self.vision) if self.stored is None else StoredTower(self.stored)
        if self.start is not None and self.stored is None:
            _load(model, self.start)
        model.set_input_tensor = _receive_nothing
        return model


class PatchMLP(nn.Module):
    """Patches through a 2-layer MLP, each by itself: what an encoder-free model has in a tower's place.

    It tells the language model nothing of a patch's place; that is left to the order of tokens, or to 2D-RoPE.
    """

    def __init__(self, patch_size: int, intermediate_size: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, intermediate_size, kernel_size=patch_size, stride=patch_size)
        self.activation = nn.GELU()
        self.output = nn.Linear(intermediate_size, hidden_size)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = True) -> Any:
        """``[n, 3, H, W]`` to the only entry of ``hidden_states``, ``[n, patches, hidden_size]``, row by row."""
        from transformers.modeling_outputs import BaseModelOutput

        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        features = self.output(self.activation(patches))
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,) if output_hidden_states else None)


def _tower(vision: VisionConfig) -> nn.Module:
    import transformers

    classes = FAMILIES[vision.family].classes
    if classes is None:
        return PatchMLP(vision.patch_size, vision.intermediate_size, vision.hidden_size)
    if vision.family == "qwen25_vl":
        from nemo_pre.neva.native_qwen_vl import build_native_qwen_vl

        return build_native_qwen_vl(vision)
    if vision.family == "aimv2_native":
        from nemo_pre.neva.native_aimv2 import build_native_aimv2

        return build_native_aimv2(vision)
    model_class, config_class = (getattr(transformers, name) for name in classes)
    model: nn.Module = model_class(config_class(**transformers_values(vision)))
    if vision.family in WITH_INNER_MODEL and not hasattr(model, "vision_model"):
        model = NamedTower(model)
    return model


def _load(tower: Any, directory: str) -> None:
    """Give a tower the weights in a directory of ``transformers``, which may be that of a whole model with one.

    Raises:
        ValueError: one is missing there, or has another shape.
    """
    tower = tower.vision_model if isinstance(tower, NamedTower) else tower
    loaded, report = type(tower).from_pretrained(
        directory,
        config=tower.config,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    unfit = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if unfit:
        raise ValueError(f"{directory} has no weights that fit {unfit[0]} ({len(unfit)} in all): name a whole tower.")
    tower.load_state_dict(loaded.state_dict())


class NamedTower(nn.Module):
    """A tower of transformers 5 under the names that transformers 4 has for its weights: those of checkpoints, which
    no version of a library may change."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision_model = tower

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        return self.vision_model(pixel_values, **options)


def encoder_features(tower: nn.Module, pixels: Tensor, feature_layer: int, num_tokens: int) -> Tensor:
    """``[n, 3, H, W]`` to what the projector sees, ``[n, num_tokens, d_vision]``: the last tokens of a layer."""
    features: Tensor = tower(pixels, output_hidden_states=True).hidden_states[feature_layer]
    return features[:, -num_tokens:]


def _receive_nothing(_: object) -> None:
    """Pipeline schedules offer every stage an input; the tower is on the first stage and has none."""


def freeze_unused_layers(vision_model: nn.Module, feature_layer: int) -> None:
    """Freeze what the features do not depend on: it gets no gradient, and Megatron's overlapped gradient
    reduction waits for ever for a parameter that is trainable but unused."""
    whole = (PatchMLP, StoredTower)
    if isinstance(vision_model, whole) or hasattr(vision_model, "merger"):  # every part of these is used
        return
    tower: Any = getattr(vision_model, "vision_model", vision_model)
    layers = tower.encoder.layer if hasattr(tower.encoder, "layer") else tower.encoder.layers
    last_used = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
    layers[last_used:].requires_grad_(False)
    for name in BESIDE_LAYERS:
        try:
            attrgetter(name)(tower).requires_grad_(False)
        except AttributeError:  # another family's
            continue
