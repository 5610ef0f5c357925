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
