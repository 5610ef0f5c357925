"""A point of a study through the planner's model: its layout, memory and step time. No run, no measurement."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from nemo_pre.checks.run import check_options
from nemo_pre.config.derived import world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.objective import LayerObjective, Objective
from nemo_pre.objectives.registry import enabled, known
from nemo_pre.planner.devices import Device, Efficiency
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.memory import fullest_rank
from nemo_pre.planner.parameters import LANGUAGE, model_parameters
from nemo_pre.planner.search import Candidate, describe_layout, indivisible, layout_words, search
from nemo_pre.planner.step_time import step_time
from nemo_pre.scaling.grid import Point
from nemo_pre.scaling.results import Result
from nemo_pre.whole_numbers import part_nearest


def compose_point(point: Point) -> RunConfig:
    """The run but for its layout, with the batch and the target layer that the point asks for.

    Raises:
        ValueError: the words do not give a run, or the batch cannot grow as asked.
    """
    from nemo_pre.config.compose import compose_run

    config = compose_run(point.words)
    batch = config.trainer.global_batch_size * point.growth
    if batch != int(batch):
        raise ValueError(f"{point.name}: a batch of {batch:g} samples is none, choose multiples of the fewest gpus.")
    config.trainer.global_batch_size = int(batch)
    if point.depth is not None:
        on_layers = objectives_on_layers(config)
        if not on_layers:
            raise ValueError(
                f"{point.name}: depths needs an objective with target layers, such as regularizers="
                f"{next(name for name, kind in known().items() if issubclass(kind, LayerObjective))}."
            )
        for objective in on_layers:
            objective.options.layers = [max(1, part_nearest(point.depth, config.model.language.num_layers))]
    return config


def objectives_on_layers(config: RunConfig) -> list[Objective]:
    """The run's enabled objectives that have target layers."""
    return [objective for objective in enabled(config) if isinstance(objective, LayerObjective)]


def simulate(point: Point, device: Device, efficiency: Efficiency) -> Result:
    """The point's figures on ``device``.

    Raises:
        ValueError: see :func:`compose_point`.
    """
    config = compose_point(point)
    result = Result(point, "simulated", **_facts(config, point.experiment))
    candidate = _laid_out(config, point, device, efficiency)
    if isinstance(candidate, str):
        return replace(result, problem=candidate)
    time, run = candidate.time, candidate.config
    return replace(
        result,
        layout=describe_layout(run),
        words=[*point.words, *layout_words(run), *_point_words(run, point)],
        step_seconds=time.seconds,
        bytes=candidate.memory,
        utilization=time.utilization(device),
        flops=time.flops,
    )


def _facts(config: RunConfig, experiment: str) -> dict[str, Any]:
    parts = model_parameters(config)
    layers = sorted({layer for objective in objectives_on_layers(config) for layer in objective.tapped_layers()})
    return {
        "parameters": sum(parts[part] for part in LANGUAGE),
        "target_layers": layers,
        "batch_size": config.trainer.global_batch_size,
        "samples": recipe_samples(experiment),
    }


@cache
def recipe_samples(experiment: str) -> int:
    """What the recipe trains on, whatever batch and steps a study gives its runs."""
    from nemo_pre.config.compose import compose_run

    trainer = compose_run([f"experiment={experiment}"]).trainer
    return trainer.max_steps * trainer.global_batch_size


def _point_words(config: RunConfig, point: Point) -> list[str]:
    words = [f"trainer.global_batch_size={config.trainer.global_batch_size}"]
    if point.depth is not None:
        words += [
            f"{objective.option('layers')}=[{objective.options.layers[0]}]"
            for objective in objectives_on_layers(config)
        ]
    return words


def _laid_out(config: RunConfig, point: Point, device: Device, efficiency: Efficiency) -> Candidate | str:
    """The point's layout on its GPUs, or why there is none."""
    if point.layout == "best":
        found = search(config, point.gpus, device, efficiency, check_options, best=1)
        if found.best:
            return found.best[0]
        return "; ".join(f"{refused.number} {kind}" for kind, refused in found.refused.items())
    one = world_size(config.parallel) // config.parallel.data
    if point.gpus % one:
        return f"{one} ranks of a replica do not divide {point.gpus} GPUs"
    run = replace(config, parallel=replace(config.parallel, data=point.gpus // one))
    problem = indivisible(run)
    if problem is not None:
        return problem
    load = largest_load(run)
    memory = fullest_rank(run, load, fused=True)[1].total
    missing = memory - device.memory * efficiency.memory
    if missing > 0:
        return f"does not fit by {missing / 1e9:.1f} GB"
    return Candidate(run, memory, step_time(run, load, device, efficiency))
