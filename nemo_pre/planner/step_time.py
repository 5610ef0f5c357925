"""Seconds of an optimizer step: compute and traffic through the pipeline, then gradients and optimizer.

An estimate from data sheets and stated efficiencies; :func:`calibrated` takes the compute's from a measured run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_pre.config.derived import overlaps_grad_reduce, world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ParallelConfig
from nemo_pre.planner.activations import LayerActivations
from nemo_pre.planner.chunks import chunks_of_stages
from nemo_pre.planner.devices import Device, Efficiency
from nemo_pre.planner.flops import Flops, model_flops, stage_flops
from nemo_pre.planner.load import FLOAT, Load, activation_bytes, attends_densely
from nemo_pre.planner.memory import stages_that_differ, state_memory
from nemo_pre.planner.parameters import costs, fp8_layers_among, rank_parameters, trainable_parameters
from nemo_pre.planner.schedule import bubble_fraction, simulate
from nemo_pre.run_files.json_files import check_type
from nemo_pre.run_files.metrics import read_metrics


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run, at the speed they are taken to have."""

    device: Device
    efficiency: Efficiency

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second between a GPU and its memory."""
        return self.device.bandwidth * self.efficiency.bandwidth

    def between_replicas(self, layout: ParallelConfig) -> float:
        """Bytes a second of a collective over the ranks that hold the same part of the model."""
        replicas = layout.data * layout.context
        together = max(min(replicas, self.device.per_node // layout.tensor), 1)  # in a server, sharing its adapters
        link = self.device.nvlink
        if together < replicas:
            link = min(link, together * self.device.network)
        return link * self.efficiency.bandwidth


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and what they follow from.

    Attributes:
        pipeline: seconds of all micro-batches' passes, waiting included.
        gradients: of the reduction over replicas that backward passes do not hide.
        optimizer: of the optimizer's step and of the gather of new weights.
        objectives: of what objectives do beside the passes, by what it is, such as gathering a teacher's weights.
        bubble: part of ``pipeline`` in which the busiest stage waits.
        stages: seconds each stage computes.
        flops: of the step's model, without recomputation.
        ranks: GPUs.
        tokens: of the samples.
    """

    pipeline: float
    gradients: float
    optimizer: float
    objectives: dict[str, float]
    bubble: float
    stages: list[float]
    flops: float
    ranks: int
    tokens: int

    @property
    def seconds(self) -> float:
        return self.pipeline + self.gradients + self.optimizer + sum(self.objectives.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def utilization(self, device: Device) -> float:
        """Model FLOPs utilization: of the bf16 peak of all GPUs (arXiv 2204.02311, appendix B)."""
        return self.flops / self.seconds / (self.ranks * device.bf16)

    @property
    def balance(self) -> float:
        """The mean stage's time beside the busiest's: 1 is even."""
        return sum(self.stages) / len(self.stages) / max(self.stages)


def step_time(
    config: RunConfig,
    load: Load,
    device: Device,
    efficiency: Efficiency,
    exact: bool = True,
) -> StepTime:
    """The step's time for a run on ``device``.

    Args:
        exact: simulate the pipeline; else take the formula for even stages with the slowest's time.
    """
    layout, trainer = config.parallel, config.trainer
    micro_batches = max(trainer.global_batch_size // (load.rows * layout.data), 1)
    counted = range(layout.pipeline) if exact else stages_that_differ(config)
    seconds = [chunk_seconds(config, load, stage, device, efficiency) for stage in counted]
    stages = [micro_batches * sum(forward + backward for forward, backward in chunks) for chunks in seconds]
    if layout.pipeline == 1:
        pipeline, bubble = stages[0], 0.0
    elif exact:
        simulated = simulate(layout.pipeline, micro_batches, seconds, _transfer(config, load, device, efficiency))
        pipeline, bubble = simulated.seconds, simulated.bubble
    else:
        bubble = bubble_fraction(layout.pipeline, layout.virtual_pipeline or 1, micro_batches)
        pipeline = max(stages) / (1 - bubble)
    gradients, optimizer = _replica_seconds(config, device, efficiency)
    return StepTime(
        pipeline=pipeline,
        gradients=gradients,
        optimizer=optimizer,
        objectives=_objective_seconds(config, micro_batches, Machine(device, efficiency)),
        bubble=bubble,
        stages=stages,
        flops=sum(model_flops(config, load).values()),
        ranks=world_size(layout),
        tokens=trainer.global_batch_size * load.length,
    )


def chunk_seconds(
    config: RunConfig, load: Load, stage: int, device: Device, efficiency: Efficiency
) -> list[tuple[float, float]]:
    """Seconds of a micro-batch's forward and backward pass through each chunk of a stage."""
    dense = attends_densely(config)
    chunks, parts = chunks_of_stages(config)[stage], stage_flops(config, load, stage, dense)
    return [
        pass_seconds(config, load, flops, chunk.layers, device, efficiency)
        for chunk, flops in zip(chunks, parts, strict=True)
    ]


def pass_seconds(
    config: RunConfig,
    load: Load,
    parts: Mapping[str, Flops],
    layers: range,
    device: Device,
    efficiency: Efficiency,
) -> tuple[float, float]:
    """Seconds of a micro-batch's forward and backward pass through ``parts``, with the traffic of the decoder's
    ``layers``.

    Raises:
        ValueError: the run wants FP8, and the GPU has none.
    """
    rate = device.bf16 * efficiency.matrix
    forward, backward = (len(layers) * wait / efficiency.bandwidth for wait in _layer_traffic(config, load, device))
    again = forward if config.parallel.recompute == "full" else 0.0
    flops = _in_bf16(config, parts, device)
    if in_fp8 := fp8_layers_among(config, layers):
        if device.fp8 is None:
            raise ValueError(f"precision={config.precision.name} needs FP8, which {device.name} lacks: choose bf16.")
        saved = 1 - device.bf16 / device.fp8  # of the matrices' time; a teacher's are counted as bf16
        flops = flops + parts["decoder matrices"] * (-saved * in_fp8 / len(layers))
    return flops.forward / rate + forward, flops.backward / rate + backward + again


def _in_bf16(config: RunConfig, parts: Mapping[str, Flops], device: Device) -> Flops:
    """The bf16 operations that would take as long as all parts do."""
    flops = sum(parts.values(), Flops())
    if config.precision.name == "fp32":
        return flops * (device.bf16 / device.fp32)
    for cost in costs(config):
        for names, rate in ((cost.tf32_parts, device.tf32), (cost.fp32_parts, device.fp32)):
            for part in (parts[name] for name in names if name in parts):
                flops = flops + part * (device.bf16 / rate - 1)
    return flops


def _layer_traffic(config: RunConfig, load: Load, device: Device) -> tuple[float, float]:
    """Seconds, at the links' full speed, that a layer's forward and backward pass wait for communication.

    Two all-reduces over tensor-parallel ranks each way, the teacher's tokens forward only; and other context ranks'
    keys and values, backward with their gradients. Under sequence parallelism an all-reduce is a gather and a scatter,
    of as many bytes; but of a column-parallel matrix's input a rank keeps its own part alone, and gathers it once more
    for the weights' gradient: six operations backward, where forward are four. Megatron lets those two and the
    scatters run beside matrix products; what that hides has not been measured, so all are counted.
    """
    layer, layout = LayerActivations(config, load, fused=True), config.parallel
    operation = layer.whole_input * (layout.tensor - 1) / layout.tensor / device.nvlink
    gathers_again = layout.sequence and not config.optim.freeze_language
    forward, backward = 4 * operation, (6 if gathers_again else 4) * operation
    near = layout.tensor * layout.context <= device.per_node
    exchanged = 2 * layer.key * (layout.context - 1) / (device.nvlink if near else device.network)
    with_teacher = 1 + load.branch / load.keys
    return (forward + exchanged) * with_teacher, backward + 2 * exchanged


def _transfer(config: RunConfig, load: Load, device: Device, efficiency: Efficiency) -> float:
    """Seconds of a message between stages, which lie on different servers unless one holds two whole stages."""
    layer, layout = LayerActivations(config, load, fused=True), config.parallel
    two_in_a_node = 2 * layout.tensor * layout.context * layout.data <= device.per_node
    link = device.nvlink if two_in_a_node else device.network
    return (layer.input + layer.teacher_message) / (link * efficiency.bandwidth)


def _replica_seconds(config: RunConfig, device: Device, efficiency: Efficiency) -> tuple[float, float]:
    """Seconds of reducing float32 gradients over replicas, and of the optimizer's step with the gather of weights."""
    layout = config.parallel
    replicas = layout.data * layout.context
    stage = max(stages_that_differ(config), key=lambda number: sum(rank_parameters(config, number).values()))
    trained = sum(trainable_parameters(config, rank_parameters(config, stage)).values())
    machine = Machine(device, efficiency)
    link = machine.between_replicas(layout)
    share = (replicas - 1) / replicas
    passes = 1 if layout.distributed_optimizer else 2  # reduce-scatter alone, or all-reduce
    gradients = passes * trained * FLOAT * share / link
    if overlaps_grad_reduce(layout):
        gradients *= 1 - efficiency.overlap
    state = state_memory(config, stage)
    touched = 2 * state["optimizer"] + state["gradients"] / (replicas if layout.distributed_optimizer else 1)
    gather = trained * activation_bytes(config) * share / link
    optimizer = touched / machine.memory_bandwidth
    return gradients, optimizer + (gather if layout.distributed_optimizer else 0.0)


def _objective_seconds(config: RunConfig, micro_batches: int, machine: Machine) -> dict[str, float]:
    """Seconds of what objectives do beside the passes, by what it is."""
    found: dict[str, float] = {}
    for cost in costs(config):
        for kind, seconds in cost.seconds(machine, micro_batches).items():
            found[kind] = found.get(kind, 0.0) + seconds
    return found


def calibrated(
    config: RunConfig, load: Load, device: Device, efficiency: Efficiency, metrics: str | Path
) -> Efficiency:
    """``efficiency`` with the matrix products' part that explains the median step of a run's ``metrics.jsonl``.

    Args:
        config, load: of that run.

    Raises:
        ValueError: the file names no step's time.
    """
    times = sorted(_step_times(metrics))
    if not times:
        raise ValueError(f"{metrics} names no step's time (step_time): calibrate with a finished run's.")
    measured = times[len(times) // 2]
    low, high = 1e-4, 1.0
    for _ in range(40):  # the time falls as the efficiency rises
        middle = (low + high) / 2
        slower = step_time(config, load, device, replace(efficiency, matrix=middle)).seconds > measured
        low, high = (middle, high) if slower else (low, middle)
    return replace(efficiency, matrix=high)


def _step_times(metrics: str | Path) -> list[float]:
    try:
        rows = read_metrics(metrics)
    except OSError as error:
        raise ValueError(f"{metrics} cannot be read: give calibrate= a run's metrics.jsonl.") from error
    times = [row["step_time"] for row in rows if row.get("step_time") is not None]  # null where it was not finite
    for time in times:
        check_type(time, float, f"{metrics}: a 'step_time'")
    return times
