"""Whole numbers out of a part of a total, as the part is meant: 0.29 of 100 is 29.

A decimal fraction has no float of its own, and 0.29 * 100 is 28.999999999999996. What lies within a relative
:data:`SLACK` of a whole number, or of a half where halves decide, is that number; a schedule's last places go the same
way. No product of a written fraction and a count comes that close without being meant: one with six decimals of up to
a million things is a whole number or a millionth off.
"""

from __future__ import annotations

import math

SLACK = 1e-12  # of a product; its own rounding is 1e-16, that of a schedule's cosine before it 1e-13


def part_down(part: float, total: float) -> int:
    """The whole things that ``part`` (0.29) of ``total`` (100) holds: ``floor(part * total)``."""
    return math.floor(_meant(part * total))


def part_up(part: float, total: float) -> int:
    """The fewest whole things that are no less than ``part`` of ``total``: ``ceil(part * total)``."""
    return math.ceil(_meant(part * total))


def part_nearest(part: float, total: float) -> int:
    """The whole number nearest to ``part`` of ``total``; a half goes to the even one, as Python's ``round`` has it."""
    return round(_meant(2 * part * total) / 2)


def _meant(product: float) -> float:
    whole = round(product)
    return whole if abs(product - whole) <= SLACK * abs(whole) else product
