"""Sizes that follow from the configuration, needed by checks and by the code that builds the model alike."""

from __future__ import annotations

from nemo_pre.config.schema import ModelConfig, ParallelConfig, PReConfig

VOCAB_MULTIPLE = 128  # divisible by every tensor-parallel size in use, so that padding never depends on the layout


def world_size(parallel: ParallelConfig) -> int:
    """The number of ranks a layout consists of."""
    return parallel.tensor * parallel.pipeline * parallel.context * parallel.data


def padded_vocab_size(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def num_visual_tokens(model: ModelConfig) -> int:
    """Visual tokens of one image in the decoder's sequence."""
    vision = model.vision
    has_class_token = vision.family == "clip" and not vision.drop_class_token
    return (vision.image_size // vision.patch_size) ** 2 + int(has_class_token)


def target_layers(pre: PReConfig, num_layers: int) -> tuple[int, ...]:
    """PRe's target layers, 1-based and sorted: L/2 by default, -1 for the last.

    Raises:
        ValueError: one is not in the model or named twice.
    """
    layers = [num_layers // 2] if pre.layers is None else [num_layers if n == -1 else n for n in pre.layers]
    if not layers or len(set(layers)) < len(layers) or not all(1 <= layer <= num_layers for layer in layers):
        raise ValueError(
            f"objective.pre.layers={pre.layers} must name different layers between 1 and {num_layers}, "
            f"or -1 for the last."
        )
    return tuple(sorted(layers))
