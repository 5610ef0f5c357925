"""Which decoder layers each pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ParallelConfig


@dataclass(frozen=True)
class Chunk:
    """A model chunk of a stage.

    Attributes:
        layers: its decoder layers, from 0.
        first: whether the encoder and the embedding belong to it.
        last: whether the output layer does.
    """

    layers: range
    first: bool
    last: bool


def chunks_of_stages(config: RunConfig) -> list[list[Chunk]]:
    """The chunks of every pipeline stage, in the order of its virtual stages.

    Raises:
        ValueError: the layers cannot be cut as the layout says.
    """
    problem = layers_problem(config)
    if problem is not None:
        raise ValueError(problem)
    layout = config.parallel
    count = num_chunks(layout)
    sizes = layout.pipeline_layers or [config.model.language.num_layers // count] * count
    ends = list(accumulate(sizes))
    chunks = [
        Chunk(range(end - size, end), first=index == 0, last=index == count - 1)
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    return [chunks[stage :: layout.pipeline] for stage in range(layout.pipeline)]


def stage_of_layer(config: RunConfig, layer: int) -> int:
    """The pipeline stage that holds a decoder layer, both counted from 0."""
    stages = chunks_of_stages(config)
    return next(stage for stage, chunks in enumerate(stages) if any(layer in chunk.layers for chunk in chunks))


def num_chunks(layout: ParallelConfig) -> int:
    """Number of model chunks of a whole pipeline."""
    return layout.pipeline * (layout.virtual_pipeline or 1)


def layers_problem(config: RunConfig) -> str | None:
    """One sentence on why the decoder layers cannot be cut into the pipeline's chunks; None: they can."""
    layout, layers = config.parallel, config.model.language.num_layers
    count, sizes = num_chunks(layout), layout.pipeline_layers
    what = "parallel.pipeline" + (" x parallel.virtual_pipeline" if layout.virtual_pipeline else "")
    if sizes is None and layers % count:
        return (
            f"{what}={count} must divide model.language.num_layers={layers}, or parallel.pipeline_layers name the "
            f"layers of each chunk."
        )
    if sizes is not None and (len(sizes) != count or sum(sizes) != layers or min(sizes) < 1):
        return (
            f"parallel.pipeline_layers={list(sizes)} must be {count} numbers above 0 ({what}) that add up to "
            f"model.language.num_layers={layers}."
        )
    return None
