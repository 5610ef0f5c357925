"""Which ranks are rehearsed, and what those that are not would have said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_pre.config.derived import world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ParallelConfig
from nemo_pre.planner.memory import stages_that_differ


@dataclass(frozen=True, order=True)
class Place:
    """A rank's coordinates in the layout, each counted from 0."""

    stage: int
    data: int = 0
    context: int = 0
    tensor: int = 0

    def __str__(self) -> str:
        named = [("tensor", self.tensor), ("context", self.context), ("replica", self.data)]
        others = [f"{name} {number}" for name, number in named if number]
        return ", ".join([f"stage {self.stage + 1}", *others])


def rank_of(layout: ParallelConfig, place: Place) -> int:
    """The global rank at a place: Megatron's order, tensor before context before data before stages."""
    within = place.tensor + layout.tensor * (place.context + layout.context * place.data)
    return within + layout.tensor * layout.context * layout.data * place.stage


def place_of(layout: ParallelConfig, rank: int) -> Place:
    """Where a global rank is."""
    rank, tensor = divmod(rank, layout.tensor)
    rank, context = divmod(rank, layout.context)
    stage, data = divmod(rank, layout.data)
    return Place(stage, data, context, tensor)


def places_for_memory(config: RunConfig, stages: Sequence[int] | None = None, second: bool = True) -> list[Place]:
    """A rank of every stage that differs, and on the first and the last stage a second tensor-parallel rank; of
    context ranks the last, whose attention holds the most.

    Args:
        stages: those instead, from 0.
        second: whether the second ranks are wanted.
    """
    chosen = sorted(set(stages_that_differ(config) if stages is None else stages))
    last = config.parallel.context - 1
    places = [Place(stage, context=last) for stage in chosen]
    ends = {0, config.parallel.pipeline - 1} & set(chosen)
    if config.parallel.tensor > 1 and second:
        places += [Place(stage, context=last, tensor=config.parallel.tensor - 1) for stage in sorted(ends)]
    return places


def places_for_messages(config: RunConfig) -> list[Place]:
    """A rank of every stage of two replicas, and of the first and the last stage a second tensor- and
    context-parallel rank; one where there is nobody to talk to."""
    layout = config.parallel
    stages = range(layout.pipeline)
    ends = sorted({0, layout.pipeline - 1})
    places = [Place(stage) for stage in stages]
    if layout.data > 1:
        places += [Place(stage, data=1) for stage in stages]
    if layout.tensor > 1:
        places += [Place(stage, tensor=layout.tensor - 1) for stage in ends]
    if layout.context > 1:
        places += [Place(stage, context=layout.context - 1) for stage in ends]
    return places


def representatives(config: RunConfig, rehearsed: Sequence[Place]) -> dict[int, int]:
    """The rehearsed rank that speaks for each rank of the run: one of the same stage, or of a stage with the same
    parts, and as near in the other coordinates as there is."""
    layout = config.parallel
    alike = _stages_alike(config)
    found = {}
    for rank in range(world_size(layout)):
        place = place_of(layout, rank)
        nearest = min(
            rehearsed,
            key=lambda other: (
                other.stage != place.stage,
                alike[other.stage] != alike[place.stage],
                other.data != place.data,
                other.tensor != place.tensor,
                other.context != place.context,
                other,
            ),
        )
        found[rank] = rank_of(layout, nearest)
    return found


def _stages_alike(config: RunConfig) -> list[int]:
    """The first stage with the same parts as each, stage by stage."""
    firsts = stages_that_differ(config)
    if len(firsts) == config.parallel.pipeline:
        return firsts
    # Stages have the same parts where swapping which of them exist changes nothing: asked one by one.
    from nemo_pre.objectives.registry import enabled
    from nemo_pre.planner.chunks import chunks_of_stages

    tapped = [objective.tapped_layers() for objective in enabled(config)]
    last = config.parallel.pipeline - 1

    def parts(stage: int) -> tuple[Any, ...]:
        chunks = chunks_of_stages(config)[stage]
        counted = tuple(
            (len(chunk.layers), *(sum(layer - 1 in chunk.layers for layer in layers) for layers in tapped))
            for chunk in chunks
        )
        return (*counted, stage == 0, stage == last)

    of_firsts = {parts(stage): stage for stage in firsts}
    return [of_firsts[parts(stage)] for stage in range(config.parallel.pipeline)]


def said_by(layout: ParallelConfig, rank: int, speaker: int, said: Any) -> Any:
    """What ``rank`` would have given to a collective of objects, told from what its representative gave.

    They give the same, but for the ranks of a group of theirs: those of the same group at the rank's own place.
    """
    if rank == speaker or not _is_group_of(said, speaker, world_size(layout)):
        return said
    own, other = place_of(layout, rank), place_of(layout, speaker)
    members = [place_of(layout, member) for member in said]
    varying = {
        name: len({getattr(member, name) for member in members}) > 1 for name in ("stage", "data", "context", "tensor")
    }
    if not all(getattr(m, name) == getattr(other, name) for m in members for name, v in varying.items() if not v):
        return said
    fixed = {name: getattr(own, name) for name, varies in varying.items() if not varies}
    return type(said)(rank_of(layout, replace(member, **fixed)) for member in members)


def _is_group_of(said: Any, rank: int, world: int) -> bool:
    if not isinstance(said, (list, tuple)) or not all(type(member) is int for member in said):
        return False
    return rank in said and len(set(said)) == len(said) and all(0 <= member < world for member in said)


def answers(
    layout: ParallelConfig,
    ranks: Sequence[int],
    speakers: Mapping[int, int],
    said: Mapping[int, Any],
    numbers: bool = False,
) -> list[Any]:
    """What all ``ranks`` of a group gave to a collective of objects.

    Args:
        numbers: they are no objects, hence never the ranks of a group.
        speakers: see :func:`representatives`.
        said: by rehearsed rank. A representative outside of the group, or that was not asked, is replaced by another
            that was.
    """
    found = []
    for rank in ranks:
        speaker = rank if rank in said else speakers[rank]
        if speaker not in said:
            speaker = min(said)
        found.append(said[speaker] if numbers else said_by(layout, rank, speaker, said[speaker]))
    return found
