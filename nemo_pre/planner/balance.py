"""Dealing decoder layers out to pipeline stages: the first also runs the encoder, the last the output layer."""

from __future__ import annotations

from dataclasses import replace

from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.registry import enabled
from nemo_pre.planner.chunks import Chunk, layers_problem, num_chunks
from nemo_pre.planner.devices import Device, Efficiency
from nemo_pre.planner.flops import chunk_flops
from nemo_pre.planner.load import Load
from nemo_pre.planner.step_time import pass_seconds

LEAST_GAIN = 0.01  # of the busiest stage's time, below which an even split is kept


def balanced(config: RunConfig, load: Load, device: Device, efficiency: Efficiency) -> RunConfig:
    """The run with the split whose busiest stage has least to do, or the even one where that is as good.

    All decoder layers count the same: what objectives add to single layers, a few hundredths of one, is left out.
    """
    even = replace(config, parallel=replace(config.parallel, pipeline_layers=None))
    if config.parallel.pipeline == 1 or config.model.language.num_layers < num_chunks(config.parallel):
        return even
    layer = _layer_seconds(even, load, device, efficiency)
    outside = [_outside_seconds(even, load, first, device, efficiency) for first in (True, False)]
    sizes = _dealt_out(even, layer, outside)
    if layers_problem(even) is None:
        even_sizes = [config.model.language.num_layers // num_chunks(config.parallel)] * num_chunks(config.parallel)
        longest = max(_stage_seconds(even, even_sizes, layer, outside))
        if longest <= (1 + LEAST_GAIN) * max(_stage_seconds(even, sizes, layer, outside)):
            return even
    return replace(config, parallel=replace(config.parallel, pipeline_layers=sizes))


def _dealt_out(config: RunConfig, layer: float, outside: list[float]) -> list[int]:
    """Layers of each chunk, dealt out one by one to the stage with least to do, of equal ones to the latest, which
    holds least; optimal since layers are alike."""
    stages = config.parallel.pipeline
    sizes = [1] * num_chunks(config.parallel)
    for _ in range(config.model.language.num_layers - len(sizes)):
        seconds = _stage_seconds(config, sizes, layer, outside)
        stage = min(range(stages), key=lambda number: (seconds[number], -number))
        chunks = range(stage, len(sizes), stages)
        sizes[min(chunks, key=lambda chunk: sizes[chunk] * layer + _outside_of(chunk, sizes, outside))] += 1
    return sizes


def _stage_seconds(config: RunConfig, sizes: list[int], layer: float, outside: list[float]) -> list[float]:
    stages = config.parallel.pipeline
    found = [sum(sizes[stage::stages]) * layer for stage in range(stages)]
    found[0] += outside[0]
    found[-1] += outside[1]
    return found


def _outside_of(chunk: int, sizes: list[int], outside: list[float]) -> float:
    return outside[0] * (chunk == 0) + outside[1] * (chunk == len(sizes) - 1)


def _layer_seconds(config: RunConfig, load: Load, device: Device, efficiency: Efficiency) -> float:
    """Seconds of a decoder layer both ways, one that no objective looks at where there is one."""
    tapped = {layer - 1 for objective in enabled(config) for layer in objective.tapped_layers()}
    plain = next((layer for layer in range(config.model.language.num_layers) if layer not in tapped), 0)
    chunk = Chunk(range(plain, plain + 1), first=False, last=False)
    return _seconds(config, load, chunk, device, efficiency)


def _outside_seconds(config: RunConfig, load: Load, first: bool, device: Device, efficiency: Efficiency) -> float:
    """Seconds of encoder and projector, or of the output layer, both ways, with what objectives have there."""
    return _seconds(config, load, Chunk(range(0), first=first, last=not first), device, efficiency)


def _seconds(config: RunConfig, load: Load, chunk: Chunk, device: Device, efficiency: Efficiency) -> float:
    parts = chunk_flops(config, load, chunk, dense=False)
    return sum(pass_seconds(config, load, parts, chunk.layers, device, efficiency))
