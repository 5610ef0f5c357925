"""Pipeline schedules, event by event: who runs what when, how much waits, how many micro-batches are in flight.

The order of each stage's passes is Megatron-Core's: 1F1B (PipeDream-flush), and interleaved 1F1B with several model
chunks per stage (arXiv 2104.04473). A simulation runs them with given times; :func:`bubble_fraction` is the formula it
must agree with where all chunks take the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Direction = Literal["F", "B"]


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass of one micro-batch through one chunk of a stage."""

    direction: Direction
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Simulated:
    """A simulated step.

    Attributes:
        seconds: from the first pass to the last.
        busy: seconds each stage computes.
    """

    seconds: float
    busy: list[float]

    @property
    def bubble(self) -> float:
        """Part of the step in which the busiest stage waits."""
        return 1 - max(self.busy) / self.seconds


@cache
def order_of_passes(stage: int, stages: int, chunks: int, micro_batches: int) -> tuple[Pass, ...]:
    """The passes that a stage runs, in order.

    Raises:
        ValueError: interleaving, with a number of micro-batches that is not a multiple of the stages.
    """
    if chunks == 1:
        warm_up = min(stages - stage - 1, micro_batches)
    elif micro_batches % stages:
        raise ValueError(f"Interleaving needs a multiple of {stages} micro-batches, not {micro_batches}.")
    else:
        warm_up = min((stages - stage - 1) * 2 + (chunks - 1) * stages, micro_batches * chunks)
    forward = [_interleaved(number, "F", stages, chunks) for number in range(micro_batches * chunks)]
    backward = [_interleaved(number, "B", stages, chunks) for number in range(micro_batches * chunks)]
    order = forward[:warm_up]
    for ahead, behind in zip(forward[warm_up:], backward, strict=False):
        order += [ahead, behind]
    return tuple(order + backward[len(forward) - warm_up :])


def _interleaved(number: int, direction: Direction, stages: int, chunks: int) -> Pass:
    """The passes' order under virtual stages: groups of as many micro-batches as there are stages go through all
    chunks before the next group starts."""
    if chunks == 1:
        return Pass(direction, 0, number)
    group, within = divmod(number, stages * chunks)
    chunk, place = divmod(within, stages)
    return Pass(direction, chunk if direction == "F" else chunks - 1 - chunk, group * stages + place)


def simulate(
    stages: int,
    micro_batches: int,
    seconds: Sequence[Sequence[tuple[float, float]]],
    transfer: float = 0.0,
) -> Simulated:
    """Simulate one step of the pipeline, event by event.

    Args:
        seconds: for every stage and chunk, of a forward and of a backward pass.
        transfer: seconds from the end of a pass to the start of the one that waits for it on another stage.
    """
    chunks = len(seconds[0])
    orders = [order_of_passes(stage, stages, chunks, micro_batches) for stage in range(stages)]
    done: dict[tuple[Direction, int, int], float] = {}  # (direction, virtual stage, micro-batch) -> when
    clock, place, busy = [0.0] * stages, [0] * stages, [0.0] * stages
    last = stages * chunks - 1
    while any(place[stage] < len(orders[stage]) for stage in range(stages)):
        moved = False
        for stage in range(stages):
            while place[stage] < len(orders[stage]):
                this = orders[stage][place[stage]]
                virtual = this.chunk * stages + stage
                needed = _needed(this, virtual, last)
                if needed is not None and needed not in done:
                    break
                here = needed is None or needed[1] % stages == stage
                ready = 0.0 if needed is None else done[needed] + (0.0 if here else transfer)
                duration = seconds[stage][this.chunk][this.direction == "B"]
                clock[stage] = max(clock[stage], ready) + duration
                busy[stage] += duration
                done[this.direction, virtual, this.micro_batch] = clock[stage]
                place[stage] += 1
                moved = True
        assert moved, "the schedule waits for itself"
    return Simulated(max(clock), busy)


def _needed(this: Pass, virtual: int, last: int) -> tuple[Direction, int, int] | None:
    """The pass whose result this one works on."""
    if this.direction == "F":
        return ("F", virtual - 1, this.micro_batch) if virtual else None
    return ("F", virtual, this.micro_batch) if virtual == last else ("B", virtual + 1, this.micro_batch)


def bubble_fraction(stages: int, chunks: int, micro_batches: int) -> float:
    """Part of a step in which a stage waits, if all chunks take the same time and transfers none:
    ``(p - 1) / (v m + p - 1)`` (arXiv 2104.04473, section 2.2, as a part of the whole step)."""
    return (stages - 1) / (chunks * micro_batches + stages - 1)


def peak(
    stage: int,
    stages: int,
    micro_batches: int,
    kept: Sequence[float],
    extra: Sequence[float],
) -> tuple[float, list[int]]:
    """The most a stage holds at once, and how many micro-batches of each chunk are in flight then.

    Args:
        kept: of every chunk, bytes from a micro-batch's forward to the end of its backward pass.
        extra: of every chunk, bytes beside them while a backward pass runs.
    """
    chunks = len(kept)
    enough = min(micro_batches, 4 * stages)  # from there on the pattern repeats
    held, numbers = 0.0, [0] * chunks
    most, at_most = 0.0, [0] * chunks
    for this in order_of_passes(stage, stages, chunks, enough):
        if this.direction == "F":
            numbers[this.chunk] += 1
            held += kept[this.chunk]
        now = held + (extra[this.chunk] if this.direction == "B" else 0.0)
        if now > most:
            most, at_most = now, list(numbers)
        if this.direction == "B":
            numbers[this.chunk] -= 1
            held -= kept[this.chunk]
    return most, at_most
