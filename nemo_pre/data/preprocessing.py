"""How a run's samples become numbers, from its configuration."""

from __future__ import annotations

from typing import Any

from nemo_pre.config.derived import fewest_visual_tokens, num_visual_tokens, sample_text_width
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import VisionConfig
from nemo_pre.config.vision_families import is_native, merge_size
from nemo_pre.data.dataset import Preprocessing
from nemo_pre.data.native_images import NativeResolution
from nemo_pre.data.tokenizer import check_size, load_tokenizer, tokenizer_path
from nemo_pre.objectives.registry import enabled, wanted_targets


def num_text_tokens(config: RunConfig) -> int:
    """T, the width of the text of a batch of samples.

    Raises:
        ValueError: the sequence does not hold the image.
    """
    visual = num_visual_tokens(config.model)
    if config.data.sequence_length < visual + 1:
        raise ValueError(
            f"data.sequence_length={config.data.sequence_length} leaves no room for text beside an image of {visual} "
            f"visual tokens: raise it"
        )
    return sample_text_width(config.model, config.data.sequence_length)


def looks_at_pixels(config: RunConfig) -> bool:
    """Whether anything but the encoder does: a frozen model whose features are not read."""
    return any(objective.looks_at_pictures() for objective in enabled(config))


def build_preprocessing(config: RunConfig, tokenizer: Any = None) -> Preprocessing:
    """``tokenizer``: an already loaded ``transformers`` tokenizer; None loads the run's.

    Raises:
        ValueError: the tokenizer cannot be loaded or is larger than the model's vocabulary.
    """
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(tokenizer_path(config))
    check_size(tokenizer, config.model.language.vocab_size)
    vision = config.model.vision
    return Preprocessing(
        tokenizer=tokenizer,
        chat_template=config.data.chat_template,
        max_text_tokens=num_text_tokens(config),
        tile_tokens=fewest_visual_tokens(config.model),
        image_size=vision.image_size,
        image_mean=tuple(vision.image_mean),
        image_std=tuple(vision.image_std),
        image_resize=config.data.image_resize,
        image_filter=config.data.image_filter,
        image_crop_from=config.data.image_crop_from,
        max_tiles=config.data.max_tiles,
        native=native_resolution(vision),
        features=config.data.features,
        pixels=looks_at_pixels(config),
        targets=tuple(
            (name, target.features, target.option("features"))
            for name, target in wanted_targets(config).items()
            if target.features is not None
        ),
    )


def native_resolution(vision: VisionConfig) -> NativeResolution | None:
    """None where images become squares."""
    if not is_native(vision):
        return None
    assert vision.min_visual_tokens is not None and vision.max_visual_tokens is not None
    return NativeResolution(vision.patch_size, merge_size(vision), vision.min_visual_tokens, vision.max_visual_tokens)
