"""Weights over training: pure functions from the optimizer step to a factor, and the options they follow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_pre.options import alternatives, choice, number


@dataclass
class ScheduleConfig:
    """A weight over training: ``constant``, or from ``start`` to the full weight by ``linear``/``cosine``."""

    kind: str = choice(
        "constant", {"constant": "1 always", "linear": "", "cosine": "half a cosine, flat at both ends"}
    )
    start: float = number(0.0, least=0)  # fraction of the weight at step 0
    steps: int = number(0, least=0)  # optimizer steps the ramp lasts


def ramp(kind: str, step: int, start: float, steps: int) -> float:
    """Factor at ``step`` of a ramp that begins at ``start`` and ends at 1 after ``steps`` optimizer steps.

    Args:
        kind: ``constant`` (1 always), ``linear`` or ``cosine`` (half a cosine, flat at both ends).
        step: optimizer steps done before this one.
        start: factor at step 0.
        steps: length of the ramp in optimizer steps.

    Raises:
        ValueError: the kind is none of these.
    """
    if kind == "constant":
        return 1.0
    progress = 1.0 if steps <= 0 else min(max(step / steps, 0.0), 1.0)
    if kind == "cosine":
        progress = half_cosine(progress)
    elif kind != "linear":
        raise ValueError(f"Schedule kind is '{kind}': choose {alternatives(ScheduleConfig, 'kind')}.")
    return start + (1.0 - start) * progress


def half_cosine(progress: float) -> float:
    """Half a cosine: 0 at ``progress`` 0 and 1 at 1, flat at both ends."""
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def part_of_run(step: int, total_steps: int) -> float:
    """The part of a run of ``total_steps`` that ``step`` optimizer steps are, between 0 and 1."""
    return 1.0 if total_steps <= 0 else min(max(step / total_steps, 0.0), 1.0)


def ignored_schedule_options(schedule: ScheduleConfig, name: str) -> Iterator[str]:
    """Options of the schedule called ``name`` that are set and have no effect."""
    if schedule.kind == "constant" and (schedule.start, schedule.steps) != (0.0, 0):
        yield f"{name}.start and steps have no effect with {name}.kind=constant."
    if schedule.kind != "constant" and schedule.steps == 0:
        yield f"{name}.kind={schedule.kind} has no effect with {name}.steps=0."
