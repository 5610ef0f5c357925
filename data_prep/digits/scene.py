"""Composing a scene: digits laid out on a small canvas, over a dim background with a little clutter.

Two layouts. ``scattered`` puts each digit into its own cell of a 3 x 3 grid, anywhere in the cell, so that no
two touch and every place has a name ("top left"). ``row`` is a loose line of at most four, to be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data_prep.digits.scans import Scans

CANVAS = 48  # pixels, square
GRID = 3
CELL = CANVAS // GRID
SIDES = (10, 15)  # pixels of a scaled scan, both ends included: 1.25 to 1.875 times the 8 x 8 original
GAP = 1  # pixels kept free between two digits
MAX_DIGITS = 6
MAX_ROW = 4
INK = 90  # a pixel of the scaled scan belongs to the digit from this value (of 255) up


@dataclass(frozen=True)
class PlacedDigit:
    """One digit of a scene: ``tile`` uint8 [side, side] is its ink, at pixel (``left``, ``top``)."""

    digit: int
    scan: int
    left: int
    top: int
    tile: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 of the ink in canvas pixels; x1 and y1 are one past the last."""
        rows = np.flatnonzero((self.tile >= INK).any(axis=1))
        columns = np.flatnonzero((self.tile >= INK).any(axis=0))
        return (
            self.left + int(columns[0]),
            self.top + int(rows[0]),
            self.left + int(columns[-1]) + 1,
            self.top + int(rows[-1]) + 1,
        )

    @property
    def height(self) -> int:
        """Pixels from the top to the bottom of the ink: what "larger" compares."""
        _, y0, _, y1 = self.box
        return y1 - y0

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column of the grid cell that a scattered digit lies in."""
        return self.top // CELL, self.left // CELL


@dataclass(frozen=True)
class Scene:
    layout: str  # scattered | row
    digits: list[PlacedDigit]


def draw_scene(rng: np.random.Generator, scans: Scans, split: str, layout: str, num_digits: int) -> Scene:
    place = {"scattered": _scatter, "row": _line_up}[layout]
    sides = [int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, num_digits)]
    digits = []
    for left, top, side in place(rng, sides):
        digit = int(rng.integers(10))
        scan = scans.draw(rng, split, digit)
        tile = np.asarray(Image.fromarray(scans.images[scan]).resize((side, side), Image.Resampling.BILINEAR))
        digits.append(PlacedDigit(digit, scan, left, top, tile))
    return Scene(layout, digits)


def _scatter(rng: np.random.Generator, sides: list[int]) -> list[tuple[int, int, int]]:
    cells = rng.choice(GRID * GRID, size=len(sides), replace=False)
    placed = []
    for cell, side in zip(cells, sides, strict=True):
        room = CELL - GAP - side
        left = int(cell) % GRID * CELL + int(rng.integers(room + 1))
        top = int(cell) // GRID * CELL + int(rng.integers(room + 1))
        placed.append((left, top, side))
    return placed


def _line_up(rng: np.random.Generator, sides: list[int]) -> list[tuple[int, int, int]]:
    """A row from left to right; sides shrink until the row fits, what is left over goes between the digits."""
    sides = list(sides)
    while (spare := CANVAS - sum(sides) - GAP * (len(sides) - 1)) < 0:
        sides[int(np.argmax(sides))] -= 1
    spaces = np.diff(np.sort(rng.integers(0, spare + 1, len(sides))), prepend=0)
    middle = int(rng.integers(SIDES[1] // 2 + 3, CANVAS - SIDES[1] // 2 - 3))
    left, placed = 0, []
    for side, space in zip(sides, spaces, strict=True):
        left += int(space)
        top = middle - side // 2 + int(rng.integers(-2, 3))
        placed.append((left, min(max(top, 0), CANVAS - side), side))
        left += side + GAP
    return placed


def render(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The image, uint8 [CANVAS, CANVAS, 3], and the mask, uint8 [CANVAS, CANVAS]: 0, or 1 + index of the digit."""
    canvas = _background(rng)
    mask = np.zeros((CANVAS, CANVAS), np.uint8)
    for instance, placed in enumerate(scene.digits, start=1):
        side = len(placed.tile)
        window = np.s_[placed.top : placed.top + side, placed.left : placed.left + side]
        opacity = placed.tile[:, :, None].astype(np.float64) / 255.0
        colour = rng.uniform(150, 255, 3)
        canvas[window] = canvas[window] * (1 - opacity) + colour * opacity
        mask[window][placed.tile >= INK] = instance
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8), mask


def _background(rng: np.random.Generator) -> np.ndarray:
    """A dim colour that changes slowly from top to bottom, with a few faint strokes and specks."""
    top, bottom = rng.uniform(0, 60, 3), rng.uniform(0, 60, 3)
    blend = np.linspace(0, 1, CANVAS)[:, None, None]
    canvas = np.round(np.broadcast_to(top * (1 - blend) + bottom * blend, (CANVAS, CANVAS, 3)))
    clutter = Image.fromarray(canvas.astype(np.uint8))
    pen = ImageDraw.Draw(clutter)
    for _ in range(int(rng.integers(0, 4))):
        x0, y0 = (int(v) for v in rng.integers(0, CANVAS, 2))
        dx, dy = (int(v) for v in rng.integers(-10, 11, 2))
        pen.line((x0, y0, x0 + dx, y0 + dy), fill=tuple(int(v) for v in rng.integers(40, 100, 3)))
    for x, y in rng.integers(0, CANVAS, (int(rng.integers(0, 9)), 2)):
        pen.point((int(x), int(y)), fill=tuple(int(v) for v in rng.integers(50, 120, 3)))
    return np.asarray(clutter).astype(np.float64)
