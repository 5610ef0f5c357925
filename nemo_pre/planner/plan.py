"""What a run needs in the layout it names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.cost import Message
from nemo_pre.planner.balance import balanced
from nemo_pre.planner.devices import Device, Efficiency
from nemo_pre.planner.flops import model_flops
from nemo_pre.planner.load import Load, largest_load
from nemo_pre.planner.memory import RankMemory, rank_memory, stages_that_differ
from nemo_pre.planner.parameters import costs, model_parameters, not_counted, rank_parameters
from nemo_pre.planner.search import indivisible
from nemo_pre.planner.step_time import StepTime, step_time


@dataclass(frozen=True)
class Plan:
    """A layout and what a run needs in it.

    Attributes:
        config: the run in this layout.
        parameters: of the model by part.
        stages: of the stages that differ, parameters of a rank and its memory.
        flops: of a step by part.
        messages: between stages in a micro-batch, beside the activations.
        not_counted: what is left out of enabled objectives, as one sentence each.
        problem: why the layout cannot be; time and stages are then empty.
        better: the same layout with its decoder layers dealt out by cost, where that is faster or the only way.
    """

    config: RunConfig
    load: Load
    parameters: dict[str, int]
    flops: dict[str, float]
    stages: dict[int, tuple[int, RankMemory]] = field(default_factory=dict)
    time: StepTime | None = None
    messages: list[Message] = field(default_factory=list)
    not_counted: list[str] = field(default_factory=list)
    problem: str | None = None
    better: tuple[RunConfig, StepTime] | None = None

    @property
    def fullest(self) -> tuple[int, RankMemory]:
        stage = max(self.stages, key=lambda number: self.stages[number][1].total)
        return stage, self.stages[stage][1]

    @property
    def gpu_hours(self) -> float:
        assert self.time is not None
        return self.time.seconds * self.config.trainer.max_steps * self.time.ranks / 3600

    @property
    def readers(self) -> int:
        """Loader processes of the whole run, each of which reads shards."""
        return self.config.parallel.data * max(self.config.data.num_workers, 1)


def plan_layout(config: RunConfig, device: Device, efficiency: Efficiency, images_per_row: int | None = None) -> Plan:
    """What the run needs in the layout it names, on ``device`` (with Transformer Engine's layers)."""
    load = largest_load(config, images_per_row)
    plan = Plan(config, load, model_parameters(config), model_flops(config, load), not_counted=not_counted(config))
    even_out = balanced(config, load, device, efficiency)
    if even_out.parallel.pipeline_layers != config.parallel.pipeline_layers and indivisible(even_out) is None:
        plan = replace(plan, better=(even_out, step_time(even_out, load, device, efficiency)))
    problem = indivisible(config)
    if problem is not None:
        return replace(plan, problem=problem)
    stages = {
        stage: (sum(rank_parameters(config, stage).values()), rank_memory(config, load, stage, fused=True))
        for stage in stages_that_differ(config)
    }
    messages = [message for cost in costs(config) for message in cost.messages(load)]
    time = step_time(config, load, device, efficiency)
    return replace(plan, stages=stages, time=time, messages=messages)
