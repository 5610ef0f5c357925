"""What was rehearsed beside what is planned, and what of it is an error."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nemo_pre.config.run import RunConfig
from nemo_pre.planner.activations import LayerActivations
from nemo_pre.planner.chunks import chunks_of_stages
from nemo_pre.planner.flops import stage_flops
from nemo_pre.planner.load import FLOAT, Load, activation_bytes, attends_densely, largest_load
from nemo_pre.planner.memory import rank_memory
from nemo_pre.planner.parameters import costs, rank_parameters, trainable_parameters
from nemo_pre.rehearsal.calls import Call
from nemo_pre.rehearsal.found import Found
from nemo_pre.rehearsal.places import Place

OVER = 0.03  # by which a plan may be above what was measured; it may never be under
STATE_APART = 1e-3  # by which the state from step to step may differ from its plan
SMALL = 1 << 20  # bytes beside that: counters, frequencies, and what pads buffers
LEAK = 4096  # bytes that may be held after a step more than after the one before: counters of what is logged
FLOPS_APART = 0.01  # by which FLOPs of matrix products and attention may differ
STATE_KINDS = ("weights", "gradients", "optimizer", "FP8 copies")


@dataclass(frozen=True)
class Beside:
    """One rank's memory and FLOPs beside the plan's.

    Attributes:
        measured, planned: bytes by kind; ``a step`` is what a step adds at its peak, with working memory.
        forward: of each chunk, FLOPs of a full micro-batch's forward pass, measured and planned.
    """

    place: Place
    measured: dict[str, int]
    planned: dict[str, int]
    forward: list[tuple[float, float]] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return sum(self.measured.values())

    @property
    def plan(self) -> int:
        return sum(self.planned.values())

    @property
    def over(self) -> float:
        """The part of the measured peak by which the plan is above it."""
        return self.plan / self.peak - 1


def beside_plan(config: RunConfig, found: Found) -> Beside:
    """The rank's figures beside the plan's of its stage.

    Args:
        config: the run that was rehearsed.
    """
    load = largest_load(config)
    forward = [
        sum(part.forward for part in parts.values())
        for parts in stage_flops(config, load, found.place.stage, dense=attends_densely(config))
    ]
    return Beside(
        place=found.place,
        measured={**found.state, "a step": found.peak - found.state_bytes},
        planned=planned_memory(config, found.place.stage),
        forward=list(zip(map(float, found.forward_flops), forward, strict=True)),
    )


def planned_memory(config: RunConfig, stage: int) -> dict[str, int]:
    """The plan's bytes of a stage's ranks, by the kinds that a rehearsal tells apart."""
    planned = rank_memory(config, largest_load(config), stage, fused=True)
    working = sum(size for kind, size in planned.working.items() if kind != "libraries")
    return {
        **{kind: planned.state.get(kind, 0) for kind in STATE_KINDS},
        "others that stay": sum(size for kind, size in planned.state.items() if kind not in STATE_KINDS),
        "a step": sum(planned.activations.values()) + working,
    }


def missed(beside: Beside, found: Found) -> list[str]:
    """The tolerances that a rank misses, as one sentence each."""
    where = str(beside.place)
    sentences = outside_tolerance(where, beside.plan, beside.peak)
    for kind in (*STATE_KINDS, "others that stay"):
        measured, planned = beside.measured.get(kind, 0), beside.planned[kind]
        if abs(measured - planned) > STATE_APART * max(measured, planned) + SMALL:
            sentences.append(f"{where}: {kind} take {gib(measured)} GiB and are planned as {gib(planned)}.")
    if found.growth > LEAK:
        lines = "; ".join(f"{size} bytes of {line}" for line, size in found.grown[:3])
        sentences.append(f"{where}: {found.growth} bytes more are held after a step than after the last: {lines}.")
    return sentences


def outside_tolerance(where: str, plan: int, peak: int) -> list[str]:
    """A sentence where a plan is under a rehearsed peak, or too far over it."""
    over = plan / peak - 1
    if over < 0:
        return [f"{where}: the plan is {-over:.2%} under the rehearsed peak, {gib(plan)} beside {gib(peak)} GiB."]
    if over > OVER:
        return [
            f"{where}: the plan is {over:.2%} over the rehearsed peak, {gib(plan)} beside {gib(peak)} GiB; at most "
            f"{OVER:.0%} is wanted."
        ]
    return []


def remarks(beside: Beside, found: Found) -> list[str]:
    """What differs from the plan or looks odd, and is no error."""
    told = []
    for number, (measured, planned) in enumerate(beside.forward):
        if abs(measured - planned) > FLOPS_APART * max(measured, planned):
            chunk = f"chunk {number + 1}: " if len(beside.forward) > 1 else ""
            told.append(
                f"{beside.place}, {chunk}a full micro-batch's forward pass is {measured / 1e12:.3f} TFLOP and planned "
                f"as {planned / 1e12:.3f}."
            )
    for line, number in found.both:
        told.append(f"{beside.place}: {number} calls a step are given tensors of host and device: {line}.")
    return told


def gib(size: float) -> str:
    return f"{size / 1024**3:.2f}"


# --- messages and collectives ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Calls of one kind in a step.

    Attributes:
        ranks: of their groups.
        bytes: of all of them, that this rank gives.
        planned: bytes that the plan counts, of the kinds that it does count; None: not counted by themselves.
    """

    kind: str
    group: str
    ranks: int
    device: str
    number: int
    bytes: int
    planned: int | None = None


def traffic(config: RunConfig, found: Found, step: str = "2") -> list[Traffic]:
    """A rank's calls in a step by kind and group, messages beside the plan's."""
    numbers: Counter[tuple[str, str, int, str]] = Counter()
    sizes: Counter[tuple[str, str, int, str]] = Counter()
    for call in found.log.calls:
        if call.phase == step and len(call.ranks) > 1:
            key = (call.kind, kind_of_group(config, call), len(call.ranks), call.device)
            numbers[key] += 1
            sizes[key] += call.bytes
    planned = planned_bytes(config, found)
    return [
        Traffic(*key, number=numbers[key], bytes=sizes[key], planned=planned.get(key[:2])) for key in sorted(numbers)
    ]


def kind_of_group(config: RunConfig, call: Call) -> str:
    """Along which axes of the layout the ranks of a call's group differ."""
    from nemo_pre.rehearsal.places import place_of

    places = [place_of(config.parallel, rank) for rank in call.ranks]
    axes = {"tensor": "tensor", "context": "context", "data": "data", "stage": "pipeline"}
    differ = [name for axis, name in axes.items() if len({getattr(place, axis) for place in places}) > 1]
    return " x ".join(differ) or "alone"


def planned_bytes(config: RunConfig, found: Found) -> dict[tuple[str, str], int]:
    """Bytes that the plan has this rank give in a step, by kind of call and of group, where the plan counts them by
    themselves: messages between stages, gradients to replicas, and weights from them."""
    layout, stage = config.parallel, found.place.stage
    axes = [name for name, size in (("context", layout.context), ("data", layout.data)) if size > 1]
    trained = sum(trainable_parameters(config, rank_parameters(config, stage)).values())
    sharded = layout.distributed_optimizer
    planned = {("send", "pipeline"): planned_sends(config, found)}
    planned["reduce_scatter" if sharded else "all_reduce", " x ".join(axes)] = trained * FLOAT
    if sharded:
        share = trained * activation_bytes(config) // (layout.data * layout.context)
        planned["all_gather", " x ".join(axes)] = share
    return planned


def planned_sends(config: RunConfig, found: Found) -> int:
    """Bytes that the plan has this rank send along its pipeline in a step: activations or their gradients at every end
    of a chunk, as large as the largest micro-batch's, and what objectives send to other stages."""
    load, layout = largest_load(config), config.parallel
    layer = LayerActivations(config, load, fused=True)
    chunks = chunks_of_stages(config)[found.place.stage]
    ends = sum((not chunk.last) + (not chunk.first) for chunk in chunks) if layout.pipeline > 1 else 0
    micro_batches = config.trainer.global_batch_size // (load.rows * layout.data)
    activations = ends * (layer.input + layer.teacher_message)
    return micro_batches * (activations + _objectives_send(config, load, found.place.stage))


def _objectives_send(config: RunConfig, load: Load, stage: int) -> int:
    sent = [message for cost in costs(config) for message in cost.messages(load)]
    return sum(message.bytes for message in sent if message.source == stage)
