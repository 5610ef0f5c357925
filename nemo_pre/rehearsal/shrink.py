"""The run that a rehearsal runs: as many micro-batches as fill the schedule, and if asked fewer layers."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate

from nemo_pre.config.run import RunConfig
from nemo_pre.config.vision_families import FAMILIES
from nemo_pre.objectives.registry import enabled
from nemo_pre.planner.chunks import num_chunks
from nemo_pre.planner.schedule import order_of_passes

STEPS = 2
FEWEST_TOWER_LAYERS = 3  # the features' layer may be the last but one; of Qwen2.5-VL one attends to the whole picture


def rehearsed_run(config: RunConfig, special: int) -> RunConfig:
    """The run with :data:`STEPS` steps of as many micro-batches as a rehearsal needs.

    Args:
        special: micro-batches at a step's end that are not the largest.
    """
    layout, trainer = config.parallel, config.trainer
    micro_batches = filling_micro_batches(config) + special
    if layout.virtual_pipeline:
        micro_batches = -(-micro_batches // layout.pipeline) * layout.pipeline
    trainer = replace(
        trainer,
        max_steps=STEPS,
        global_batch_size=trainer.micro_batch_size * layout.data * micro_batches,
    )
    data = replace(config.data, num_workers=0, record_samples=False)
    return replace(
        config,
        trainer=trainer,
        data=data,
        init_from=None,
        vision_from=None,
        resume=False,
        platform="gpu",
        dry_run=True,
        cluster=deepcopy(config.cluster),
    )


def filling_micro_batches(config: RunConfig) -> int:
    """The fewest micro-batches with which every stage holds as many in flight as with any number."""
    layout = config.parallel
    step = layout.pipeline if layout.virtual_pipeline else 1
    chunks = layout.virtual_pipeline or 1
    enough = [_most_in_flight(stage, layout.pipeline, chunks, 4 * layout.pipeline) for stage in range(layout.pipeline)]
    number = step
    while any(_most_in_flight(stage, layout.pipeline, chunks, number) < most for stage, most in enumerate(enough)):
        number += step
    return number


def _most_in_flight(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    held = most = 0
    for each in order_of_passes(stage, stages, chunks, micro_batches):
        held += 1 if each.direction == "F" else -1
        most = max(most, held)
    return most


# --- fewer layers ---------------------------------------------------------------------------------------------------


def cut_depth(config: RunConfig, layers: int) -> RunConfig:
    """The run with about ``layers`` decoder layers and a tower of as many, everything else at its size.

    Every pipeline chunk keeps at least a layer, and as many as it has target layers; target layers stay in their
    chunk. Chunks that had as many layers as each other still have.
    """
    if layers >= config.model.language.num_layers:
        return config
    config = deepcopy(config)
    layout, language = config.parallel, config.model.language
    count = num_chunks(layout)
    sizes = list(layout.pipeline_layers or [language.num_layers // count] * count)
    least = _fewest_layers(config, sizes)
    smaller = [max(round(size * layers / language.num_layers), least) for size in sizes]
    smaller = [
        min(-(-new // layout.recompute_num_layers) * layout.recompute_num_layers, old)
        for new, old in zip(smaller, sizes, strict=True)
    ]
    _move_targets(config, sizes, smaller)
    language.num_layers = sum(smaller)
    layout.pipeline_layers = smaller if layout.pipeline_layers else None
    ends = config.precision.bf16_layers
    config.precision.bf16_layers = None if ends is None else min(ends, language.num_layers // 2)
    _cut_tower(config, layers)
    return config


def _targets_of_chunks(layers: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """The target layers of each chunk, 1-based within it."""
    ends = list(accumulate(sizes))
    return [
        [layer - end + size for layer in layers if end - size < layer <= end]
        for end, size in zip(ends, sizes, strict=True)
    ]


def _fewest_layers(config: RunConfig, sizes: Sequence[int]) -> int:
    tapped = [objective.tapped_layers() for objective in enabled(config)]
    return max([1, *(len(found) for layers in tapped for found in _targets_of_chunks(layers, sizes))])


def _move_targets(config: RunConfig, sizes: Sequence[int], smaller: Sequence[int]) -> None:
    """Name the target layers of the shallower decoder, in the same chunks and the same order."""
    for objective in enabled(config):
        layers = objective.tapped_layers()
        if not layers:
            continue
        moved, start = [], 0
        for found, size, new in zip(_targets_of_chunks(layers, sizes), sizes, smaller, strict=True):
            free = new
            for place, layer in reversed(list(enumerate(found))):
                free = max(min(-(-layer * new // size), free), place + 1)
                moved.append(start + free)
                free -= 1
            start += new
        objective.options.layers = sorted(moved)


def _cut_tower(config: RunConfig, layers: int) -> None:
    vision = config.model.vision
    if FAMILIES[vision.family].classes is None:
        return
    fewer = min(vision.num_layers, max(layers, FEWEST_TOWER_LAYERS))
    if vision.full_attention_layers and fewer < vision.num_layers:
        vision.full_attention_layers = [fewer - 1]  # the others attend within windows
    if vision.feature_layer >= 0:
        vision.feature_layer = min(vision.feature_layer, fewer)
    elif vision.feature_layer < -2:
        vision.feature_layer = max(vision.feature_layer, -fewer)
    vision.num_layers = fewer
