"""How LaVer's mask ratio and the teacher's momentum change over a run: pure functions from the optimizer step."""

from __future__ import annotations

from nemo_pre.objectives.schedules import half_cosine, part_of_run
from nemo_pre.whole_numbers import part_down


def mask_ratio(kind: str, step: int, total_steps: int, final: float) -> float:
    """Share of visual tokens that LaVer masks after ``step`` optimizer steps of ``total_steps``.

    Args:
        kind: ``cosine`` (from 0 to ``final`` by half a cosine), ``delayed`` (0 for the first eighth of the run, then
            ``final``; the released code calls it "constant") or ``constant``.

    Source: LaVer's released code (4ce7bd9), train/callbacks.py; the paper names a cosine ramp without values.

    Raises:
        ValueError: the kind is none of these.
    """
    if kind == "cosine":
        return final * half_cosine(part_of_run(step, total_steps))
    if kind == "delayed":
        return 0.0 if step < 0.125 * total_steps else final
    if kind == "constant":
        return final
    raise ValueError(f"Mask schedule is '{kind}': choose cosine, delayed or constant.")


def teacher_momentum(kind: str, step: int, total_steps: int, start: float) -> float:
    """Momentum of the teacher's average at the update after ``step`` optimizer steps of ``total_steps``.

    Args:
        kind: ``constant``, or ``cosine`` from ``start`` to 1: ``1 - (1 - start) (cos(pi t / T) + 1) / 2`` (the
            released code).

    Raises:
        ValueError: the kind is none of these.
    """
    if kind == "constant":
        return start
    if kind == "cosine":
        return 1.0 - (1.0 - start) * (1.0 - half_cosine(part_of_run(step, total_steps)))
    raise ValueError(f"Momentum schedule is '{kind}': choose constant or cosine.")


def update_interval(every: int, fraction: float | None, total_steps: int) -> int:
    """Optimizer steps between two updates of the teacher: ``every``, or ``fraction`` of the run, rounded down."""
    return every if fraction is None else max(part_down(fraction, total_steps), 1)


def updates_teacher(step: int, interval: int) -> bool:
    """Whether the teacher moves after optimizer step number ``step`` (1-based)."""
    return step % interval == 0
