"""A tiny NeVA for tests: its shape, random weights under Megatron's names, and random batches with images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from tests.reference.neva_laver import LaVerReferenceConfig
from tests.reference.neva_pre import IMAGE_TOKEN, NO_LABEL, ReferenceConfig, vision_tower
from tests.reference.viral import head_prefix

WIDTH, FFN, HEADS, GROUPS, LAYERS, VOCABULARY = 32, 48, 4, 2, 4, 256
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TOKENS_PER_IMAGE = 4
TEXT_LENGTH, MAX_LENGTH = 12, 24
LAVER_HEAD = 24
VIRAL_HEAD, TARGET_WIDTH = 12, 20


def tiny_config(**changes: Any) -> ReferenceConfig:
    shape: dict[str, Any] = {
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "max_sequence_length": MAX_LENGTH,
        "vision": CLIPVisionConfig(**VISION),
    }
    return ReferenceConfig(**{**shape, **changes})


def random_state(
    config: ReferenceConfig,
    seed: int = 0,
    qkv_bias: bool = False,
    head_norm: bool = False,
    head_hidden: int = 8,
    viral_hidden: int = VIRAL_HEAD,
) -> dict[str, Tensor]:
    """Weights of the whole model, large enough that no gradient vanishes, norms away from 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.1, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std + mean

    head_dim = config.head_dim or WIDTH // config.num_attention_heads
    qkv_rows = (config.num_attention_heads + 2 * config.num_query_groups) * head_dim
    vision_width, inner = config.vision.hidden_size, WIDTH
    if config.vision.model_type == "qwen2_5_vl":
        vision_width = inner = 4 * vision_width
    lm = "language_model."
    state = {
        f"{lm}embedding.word_embeddings.weight": normal(VOCABULARY, WIDTH),
        f"{lm}decoder.final_layernorm.weight": normal(WIDTH, mean=1.0),
        "vision_projection.0.weight": normal(inner, vision_width, std=0.3),
        "vision_projection.0.bias": normal(inner),
        "vision_projection.2.weight": normal(WIDTH, inner, std=0.2),
        "vision_projection.2.bias": normal(WIDTH),
    }
    if not config.tie_embeddings:
        state[f"{lm}output_layer.weight"] = normal(VOCABULARY, WIDTH)
    for layer in range(config.num_layers):
        at = f"{lm}decoder.layers.{layer}."
        state[f"{at}input_layernorm.weight"] = normal(WIDTH, mean=1.0)
        state[f"{at}self_attention.linear_qkv.weight"] = normal(qkv_rows, WIDTH, std=0.2)
        if qkv_bias:
            state[f"{at}self_attention.linear_qkv.bias"] = normal(qkv_rows)
        state[f"{at}self_attention.linear_proj.weight"] = normal(WIDTH, config.num_attention_heads * head_dim)
        state[f"{at}pre_mlp_layernorm.weight"] = normal(WIDTH, mean=1.0)
        state[f"{at}mlp.linear_fc1.weight"] = normal(2 * FFN, WIDTH, std=0.2)
        state[f"{at}mlp.linear_fc2.weight"] = normal(WIDTH, FFN)
    for layer in config.pre_layers:
        at = f"pre_heads.{layer}."
        anchor_width = vision_width if config.pre_anchor == "pre_projector" else WIDTH
        if head_norm:
            state[f"{at}norm.weight"], state[f"{at}norm.bias"] = normal(WIDTH, mean=1.0), normal(WIDTH)
        state[f"{at}fc1.weight"], state[f"{at}fc1.bias"] = normal(head_hidden, WIDTH, std=0.3), normal(head_hidden)
        state[f"{at}fc2.weight"], state[f"{at}fc2.bias"] = (
            normal(anchor_width, head_hidden, std=0.3),
            normal(anchor_width),
        )
    for name, weight in vision_tower(config).named_parameters():
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[f"vision_model.{name}"] = normal(*weight.shape, mean=base)
    if isinstance(config, LaVerReferenceConfig) and config.laver:
        if config.mask_token_id is None:
            state["laver_mask_token"] = normal(WIDTH)
        for name, rows, columns in (("fc1", LAVER_HEAD, WIDTH), ("fc2", LAVER_HEAD, LAVER_HEAD)):
            state[f"laver_head.{name}.weight"] = normal(rows, columns, std=0.3)
            state[f"laver_head.{name}.bias"] = normal(rows)
        state["laver_head.fc3.weight"] = normal(WIDTH, LAVER_HEAD, std=0.3)
    viral = config.viral
    width = vision_width if viral.target == "encoder" else TARGET_WIDTH
    widths = [WIDTH, *[viral_hidden] * (viral.head_depth - 1), width]
    for prefix in dict.fromkeys(head_prefix(layer, viral) for layer in viral.layers) if viral.has_head else ():
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            state[f"{prefix}fc{number}.weight"] = normal(outputs, inputs, std=0.3)
            state[f"{prefix}fc{number}.bias"] = normal(outputs)
    return state


def random_teacher(config: LaVerReferenceConfig, seed: int, **shape: Any) -> dict[str, Tensor]:
    """Other weights for the parts of the model that LaVer averages."""
    averaged = ("language_model.decoder.", "laver_head.")
    return {name: weight for name, weight in random_state(config, seed, **shape).items() if name.startswith(averaged)}


def with_targets(batch: dict[str, Any], seed: int = 0, width: int = TARGET_WIDTH) -> dict[str, Any]:
    """The batch with random features for every tile, as the loader reads them from the disk."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tiles = sum(batch["num_media_tiles"])
    features = torch.randn(tiles, TOKENS_PER_IMAGE, width, generator=generator)
    return {**batch, "targets": {"viral": features} if tiles else {}}


def random_batch(
    images_per_sample: Sequence[int], seed: int = 0, text_length: int = TEXT_LENGTH, answer: int = 5
) -> dict[str, Any]:
    """One micro-batch in NeVA's raw format, one sample per entry of ``images_per_sample``.

    The loss counts the last ``answer`` minus (0, 1, 2 ...) text positions, so every sample weighs differently.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = len(images_per_sample)
    text = torch.randint(3, VOCABULARY - 6, (rows, text_length + 1), generator=generator)
    for row, count in enumerate(images_per_sample):
        where = torch.randperm(text_length - answer, generator=generator)[:count]
        text[row, where] = IMAGE_TOKEN
    tokens, labels = text[:, :-1].clone(), text[:, 1:].clone()
    loss_mask = torch.zeros(rows, text_length)
    for row in range(rows):
        loss_mask[row, text_length - answer + (row % 3) :] = 1.0
    labels[labels == IMAGE_TOKEN] = NO_LABEL
    labels[loss_mask == 0] = NO_LABEL
    total = sum(images_per_sample)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": loss_mask,
        "position_ids": torch.arange(text_length).repeat(rows, 1),
        "attention_mask": None,
        "media": torch.randn(total, 3, VISION["image_size"], VISION["image_size"], generator=generator)
        if total
        else None,
        "num_media_tiles": [1] * total,
    }


# --- native resolution ----------------------------------------------------------------------------------------------

NATIVE_SIZES = {
    "image_size": 0,
    "patch_size": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 3,
    "num_attention_heads": 2,
    "drop_class_token": False,
    "min_visual_tokens": 1,
    "max_visual_tokens": 8,
}
NATIVE: dict[str, dict[str, Any]] = {  # fields of VisionConfig
    "qwen25_vl": {
        "family": "qwen25_vl",
        **NATIVE_SIZES,
        "feature_layer": -1,
        "window_size": 8,
        "full_attention_layers": [1],
    },
    "aimv2_native": {"family": "aimv2_native", **NATIVE_SIZES, "feature_layer": -2},
}
GRIDS = [(1, 3), (3, 2), (2, 2), (1, 1), (4, 1), (2, 4), (3, 1)]


def native_vision(family: str) -> Any:
    """``transformers``' configuration of a tower in :data:`NATIVE`."""
    from transformers import Aimv2VisionConfig
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    if family == "aimv2_native":
        return Aimv2VisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=2,
            is_native=True, use_head=False,
        )  # fmt: skip
    return Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=2, window_size=8,
        fullatt_block_indexes=[1], out_hidden_size=WIDTH,
    )  # fmt: skip


def with_native_images(batch: dict[str, Any], seed: int, family: str) -> dict[str, Any]:
    """A batch of :func:`random_batch` with images of several sizes in the place of its own."""
    patches_per_token = {"qwen25_vl": 4, "aimv2_native": 1}[family]
    generator = torch.Generator().manual_seed(seed)
    count = len(batch["num_media_tiles"])
    grids = [GRIDS[int(torch.randint(len(GRIDS), (), generator=generator))] for _ in range(count)]
    tokens = sum(rows * columns for rows, columns in grids)
    patches = torch.randn(tokens, patches_per_token, 3 * 2**2, generator=generator) if count else None
    return {**batch, "media": patches, "media_grids": grids}


def image_sizes(batch: dict[str, Any]) -> list[int]:
    """Visual tokens of each image of a batch."""
    if "media_grids" in batch:
        return [rows * columns for rows, columns in batch["media_grids"]]
    return [TOKENS_PER_IMAGE] * len(batch["num_media_tiles"])
