"""Schedules: pure functions from the optimizer step to a factor."""

from __future__ import annotations

import math


def ramp(kind: str, step: int, start: float, steps: int) -> float:
    """Factor at ``step`` of a ramp that begins at ``start`` and ends at 1 after ``steps`` optimizer steps.

    Args:
        kind: ``constant`` (1 always), ``linear`` or ``cosine`` (half a cosine, flat at both ends).
        step: optimizer steps done before this one.
        start: factor at step 0.
        steps: length of the ramp in optimizer steps.
    """
    if kind == "constant":
        return 1.0
    progress = 1.0 if steps <= 0 else min(max(step / steps, 0.0), 1.0)
    if kind == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    elif kind != "linear":
        raise ValueError(f"Schedule kind is '{kind}': choose constant, linear or cosine.")
    return start + (1.0 - start) * progress


def mask_ratio(kind: str, step: int, total_steps: int, final: float) -> float:
    """Share of visual tokens that LaVer masks after ``step`` optimizer steps of ``total_steps``.

    Args:
        kind: ``cosine`` (from 0 to ``final`` by half a cosine), ``delayed`` (0 for the first eighth of the run, then
            ``final``; the released code calls it "constant") or ``constant``.

    Source: LaVer's released code (4ce7bd9), train/callbacks.py; the paper names a cosine ramp without values.
    """
    if kind == "cosine":
        return final * (1.0 - math.cos(math.pi * _progress(step, total_steps))) / 2.0
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
    """
    if kind == "constant":
        return start
    if kind == "cosine":
        return 1.0 - (1.0 - start) * (math.cos(math.pi * _progress(step, total_steps)) + 1.0) / 2.0
    raise ValueError(f"Momentum schedule is '{kind}': choose constant or cosine.")


def update_interval(every: int, fraction: float | None, total_steps: int) -> int:
    """Optimizer steps between two updates of the teacher: ``every``, or ``fraction`` of the run, rounded down."""
    return every if fraction is None else max(int(fraction * total_steps), 1)


def updates_teacher(step: int, interval: int) -> bool:
    """Whether the teacher moves after optimizer step number ``step`` (1-based)."""
    return step % interval == 0


def _progress(step: int, total_steps: int) -> float:
    return 1.0 if total_steps <= 0 else min(max(step / total_steps, 0.0), 1.0)
