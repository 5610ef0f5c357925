"""A whole rehearsal of one run: its ranks' memory at the asked depth, and whether all ranks' calls meet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nemo_pre.compat import versions
from nemo_pre.config.run import RunConfig
from nemo_pre.planner.chunks import num_chunks
from nemo_pre.rehearsal.batches import special_kinds
from nemo_pre.rehearsal.compare import Beside, Traffic, beside_plan, missed, remarks, traffic
from nemo_pre.rehearsal.crew import ENTRY, Crew
from nemo_pre.rehearsal.found import Found, Order
from nemo_pre.rehearsal.places import Place, places_for_memory, places_for_messages
from nemo_pre.rehearsal.rendezvous import Met, meet
from nemo_pre.rehearsal.shrink import cut_depth, rehearsed_run
from nemo_pre.rehearsal.tables import NOT_COVERED
from nemo_pre.rehearsal.targets import with_stand_ins


@dataclass(frozen=True)
class Wishes:
    """What of a run is rehearsed, and how.

    Attributes:
        layers: decoder layers that are left; None: all.
        stages: from 0, whose memory is measured; None: those that differ.
        messages: match the calls of all stages, of two replicas and a second tensor-parallel rank; without
            it no second tensor-parallel rank is rehearsed.
        jobs: ranks that compute at a time.
        entry: what a rank's process calls.
    """

    layers: int | None = None
    stages: Sequence[int] | None = None
    messages: bool = True
    jobs: int = 1
    entry: str = ENTRY
    named_from: int = 1 << 20


@dataclass
class Rehearsed:
    """What a rehearsal found.

    Attributes:
        backend: whose training was rehearsed, with its version.
        config: the run as it was rehearsed.
        layers: its decoder layers, of ``all_layers``.
        micro_batches: of a step.
        besides, found, calls: of every rank whose memory was measured.
        cut: of the ranks that were rehearsed at a layer a chunk.
        met: of all ranks' calls; None: nobody to meet, or not asked for.
        met_ranks: that were matched.
        problems: what is an error, as one sentence each. ``remarks``: what is not.
        not_covered: what a rehearsal of this run cannot see.
    """

    name: str
    backend: str
    config: RunConfig
    layers: int
    all_layers: int
    micro_batches: int
    besides: list[Beside] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    calls: list[list[Traffic]] = field(default_factory=list)
    cut: list[Found] = field(default_factory=list)
    met: Met | None = None
    met_ranks: int = 0
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Everything the tables show, in bytes, operations and seconds."""
        ranks = []
        for beside, found, calls in zip(self.besides, self.found, self.calls, strict=True):
            ranks.append(
                {
                    "place": asdict(beside.place),
                    "rank": found.rank,
                    "measured": beside.measured,
                    "planned": beside.planned,
                    "peak": beside.peak,
                    "plan": beside.plan,
                    "over": beside.over,
                    "held": found.held,
                    "flops": found.flops,
                    "forward_flops": beside.forward,
                    "kernels": found.kernels,
                    "cpu_seconds": round(found.cpu, 1),
                    **{
                        name: [list(each) for each in getattr(found, name)]
                        for name in ("lines_at_peak", "kept", "grown", "waits", "copies", "both", "guesses")
                    },
                    "calls": [asdict(each) for each in calls],
                }
            )
        return {
            "run": self.name,
            "backend": self.backend,
            "layout": asdict(self.config.parallel),
            "layers": self.layers,
            "of_layers": self.all_layers,
            "micro_batches": self.micro_batches,
            "ranks": ranks,
            "messages": None if self.met is None else {**asdict(self.met), "ranks": self.met_ranks},
            "problems": self.problems,
            "remarks": self.remarks,
            "not_covered": self.not_covered,
            "verified_on_a_gpu": None,
            "seconds": round(self.seconds, 1),
        }


def backend() -> str:
    """NeMo, whose training a run is, or without it Megatron-Core, on which a loop of one's own is."""
    nemo = versions.installed("nemo_toolkit")
    return f"Megatron-Core {versions.installed('megatron-core')}" if nemo is None else f"NeMo {nemo}"


Tell = Callable[[str], None]


def run_rehearsal(config: RunConfig, wishes: Wishes, tell: Tell = lambda text: None) -> Rehearsed:
    """Rehearse the run.

    Args:
        tell: is given a line whenever a rank has come further.

    Raises:
        RankFailure: a rank raised, or waits for another's objects for ever.
        ValueError: the run cannot be rehearsed.
    """
    started = time.monotonic()
    config, left_out = rehearsable(config)
    whole = config.model.language.num_layers
    measured = as_rehearsed(config, wishes.layers)
    matched = as_matched(config)
    for_memory = places_for_memory(measured, wishes.stages, second=wishes.messages)
    for_messages = places_for_messages(matched) if wishes.messages else []
    together = measured == matched
    crews = [(measured, sorted({*for_memory, *(for_messages if together else [])}))]
    if for_messages and not together:
        crews.append((matched, for_messages))
    clock = _Clock(crews, tell)
    results = [
        Crew(
            [Order(run, place, wishes.named_from) for place in places], wishes.jobs, wishes.entry, clock.progress
        ).run()
        for run, places in crews
    ]
    found = [each for each in results[0] if each.place in for_memory]
    rehearsed = Rehearsed(
        name=config.name,
        backend=backend(),
        config=measured,
        layers=measured.model.language.num_layers,
        all_layers=whole,
        micro_batches=Order(measured, for_memory[0]).micro_batches,
        besides=[beside_plan(measured, each) for each in found],
        found=found,
        calls=[traffic(measured, each) for each in found],
        not_covered=[*left_out, *NOT_COVERED],
    )
    for beside, each in zip(rehearsed.besides, found, strict=True):
        rehearsed.problems += missed(beside, each)
        rehearsed.remarks += remarks(beside, each)
    if for_messages or together:
        rehearsed.cut = results[-1]
    if len(for_messages) > 1:
        logs = {each.rank: each.log for each in results[-1] if each.place in for_messages}
        rehearsed.met, rehearsed.met_ranks = meet(logs), len(logs)
        rehearsed.problems += [rehearsed.met.problem] if rehearsed.met.problem is not None else []
    rehearsed.seconds = time.monotonic() - started
    return rehearsed


def rehearsable(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with what cannot be rehearsed replaced, and one sentence on each such thing."""
    left_out = []
    if versions.installed("nemo_toolkit") is None:
        left_out.append("multi_tensor_scale_tensor, by which Megatron clips and which 2.9.0 does not have")
    config, stand_ins = with_stand_ins(config)
    return config, [*left_out, *stand_ins]


def as_rehearsed(config: RunConfig, layers: int | None) -> RunConfig:
    if layers is not None:
        config = cut_depth(config, layers)
    return rehearsed_run(config, len(special_kinds(config)))


def as_matched(config: RunConfig) -> RunConfig:
    """The run whose ranks' calls are matched: a layer a chunk, and of an interleaved pipeline, whose passes are many,
    one round of micro-batches through all chunks."""
    run, layout = as_rehearsed(config, num_chunks(config.parallel)), config.parallel
    if not layout.virtual_pipeline:
        return run
    micro_batches = -(-(1 + len(special_kinds(config))) // layout.pipeline) * layout.pipeline
    batch = micro_batches * run.trainer.micro_batch_size * layout.data
    return replace(run, trainer=replace(run.trainer, global_batch_size=batch))


class _Clock:
    """Says what has been done, and how long the rest will take: as long for a rank as those before took."""

    def __init__(self, crews: Sequence[tuple[RunConfig, Sequence[Place]]], tell: Tell) -> None:
        self.tell, self.started, self.done = tell, time.monotonic(), 0
        self.ranks = sum(len(places) for _, places in crews)
        config = crews[0][0]
        tell(
            f"{config.name}: {self.ranks} ranks, {config.model.language.num_layers} decoder layers, "
            f"{Order(config, Place(0)).micro_batches} micro-batches a step; the first rank tells how long it takes"
        )

    def progress(self, order: Order, what: str) -> None:
        seconds = time.monotonic() - self.started
        line = f"  {seconds:5.0f} s  {order.place}: {what}"
        if what == "done":
            self.done += 1
            left = seconds / self.done * (self.ranks - self.done)
            line += f" ({self.done} of {self.ranks}, about {left:.0f} s left)"
        self.tell(line)
