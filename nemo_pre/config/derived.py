"""Sizes that follow from the configuration, needed by checks and by the code that builds the model alike."""

from __future__ import annotations

from nemo_pre.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from nemo_pre.config.vision_families import feature_width, is_native, merge_size, most_visual_tokens

TIME, ROW, COLUMN = 0, 1, 2  # the axes of rotary positions
FP8_MULTIPLE = 16  # of both sides of a matrix that is multiplied in FP8 (cuBLASLt), and so of a rank's tokens
FP8_BLOCK = 128  # side of the blocks that share a scale in blockwise FP8
VOCAB_MULTIPLE = 128  # divisible by every tensor-parallel size in use, so that padding never depends on the layout


def world_size(parallel: ParallelConfig) -> int:
    """The number of ranks a layout consists of."""
    return parallel.tensor * parallel.pipeline * parallel.context * parallel.data


def overlaps_grad_reduce(parallel: ParallelConfig) -> bool:
    """Whether gradients are reduced over replicas during the backward pass."""
    if parallel.overlap_grad_reduce is not None:
        return parallel.overlap_grad_reduce
    return parallel.data * parallel.context > 1


def padded_vocab_size(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def num_visual_tokens(model: ModelConfig) -> int:
    """Visual tokens of one image in the decoder's sequence; with native resolution the most it may have."""
    return most_visual_tokens(model.vision)


def fewest_visual_tokens(model: ModelConfig) -> int:
    """Visual tokens of a tile, or with native resolution the fewest an image may have."""
    if not is_native(model.vision):
        return num_visual_tokens(model)
    assert model.vision.min_visual_tokens is not None
    return model.vision.min_visual_tokens


def sample_text_width(model: ModelConfig, sequence_length: int) -> int:
    """T, the width of a sample's text: the image is one of its tokens and expands to all visual ones, with native
    resolution to the fewest an image can have."""
    return sequence_length - fewest_visual_tokens(model) + 1


def projector_widths(model: ModelConfig) -> tuple[int, int, int]:
    """Inputs, inner width and outputs of the projector. Where patches are merged it is the merger's MLP."""
    inputs, outputs = feature_width(model.vision), model.language.hidden_size
    return inputs, inputs if merge_size(model.vision) > 1 else outputs, outputs


def fp8_recipe(precision: PrecisionConfig) -> str | None:
    """Megatron's name for how FP8 is scaled: ``delayed``, ``tensorwise`` or ``blockwise``; None without FP8."""
    kind, _, recipe = precision.name.partition("_")
    return recipe if kind == "fp8" else None


def fp8_multiple(recipe: str | None, sequence_parallel: bool) -> int:
    """What a rank's tokens, and the decoder's width, must be a multiple of. Transformer Engine gathers the shards of
    sequence parallelism in FP8, where blockwise scaling wants whole blocks."""
    if recipe is None:
        return 1
    return FP8_BLOCK if recipe == "blockwise" and sequence_parallel else FP8_MULTIPLE


def bf16_layers(precision: PrecisionConfig) -> int:
    """Layers at each end of the decoder that stay bf16 beside FP8 ones. Delayed scaling knows all layers or none."""
    if precision.bf16_layers is not None:
        return precision.bf16_layers
    return 0 if fp8_recipe(precision) in (None, "delayed") else 1


def axis_of_frequency(kind: str, sections: list[int] | None, num_frequencies: int) -> list[int]:
    """Which axis (0 time, 1 row, 2 column) turns each of a head's frequencies, fastest first.

    Args:
        kind: ``1d``, ``2d`` (axes row, column) or ``mrope`` (time, row, column).
        sections: consecutive frequencies per axis, in the order of the axes; None: ``2d`` alternates, so that
            both axes have fast and slow frequencies, ``mrope`` takes Qwen2-VL's 2:3:3.
        num_frequencies: half a head's width.

    Raises:
        ValueError: the sections do not fit.
    """
    if kind == "1d":
        return [TIME] * num_frequencies
    axes = [ROW, COLUMN] if kind == "2d" else [TIME, ROW, COLUMN]
    if sections is None and kind == "2d":
        return [axes[frequency % 2] for frequency in range(num_frequencies)]
    if sections is None:
        time, row = num_frequencies // 4, 3 * num_frequencies // 8
        sections = [time, row, num_frequencies - time - row]
    if len(sections) != len(axes) or sum(sections) != num_frequencies:
        raise ValueError(
            f"model.rope_sections={list(sections)} must be {len(axes)} numbers for model.rope={kind} that add up to "
            f"{num_frequencies}, half a head's width."
        )
    return [axis for axis, size in zip(axes, sections, strict=True) for _ in range(size)]
