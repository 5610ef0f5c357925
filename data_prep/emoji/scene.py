"""Composing a scene: pictures on a square canvas, over a background that they stand out from, with a little clutter.

Three layouts. ``single`` is one large picture near the center; ``scattered`` puts each of up to five into its own
cell of a 3 x 3 grid, anywhere in the cell, so that no two touch and every place has a name; ``row`` is a line of two
to four, to be read. A picture's place is the cell that the middle of its square lies in, whatever the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data_prep.emoji.concepts import Concept
from data_prep.emoji.pictures import SOLID, Gallery
from data_prep.emoji.splits import CENTER, GRID, NUM_PLACES, PLACES, Cast

MAX_PICTURES = {"single": 1, "scattered": 5, "row": 4}
SINGLE = (0.45, 0.9)  # sides of a single picture, in canvases
SCATTERED = (0.5, 0.95)  # in cells
ROW = (0.7, 0.95)  # in the canvas's part for each
SMALLEST_CANVAS = 48
STANDS_OUT = 40  # of 255, by which the background's brightness differs from every picture's
CLEARLY_LARGER = 1.3  # times the longer side of another, and its opaque pixels


@dataclass(frozen=True)
class PlacedPicture:
    """``tile`` uint8 [height, width, 4] at pixel (``left``, ``top``); ``colour`` is None where none is clear."""

    concept: Concept
    style: str
    colour: str | None
    place: int
    left: int
    top: int
    tile: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 in canvas pixels; x1 and y1 are one past the last."""
        height, width = self.tile.shape[:2]
        return self.left, self.top, self.left + width, self.top + height

    @property
    def place_name(self) -> str:
        return PLACES[self.place // GRID][self.place % GRID]

    @property
    def sizes(self) -> tuple[int, int]:
        """The longer side and the number of opaque pixels."""
        return max(self.tile.shape[:2]), int((self.tile[..., 3] >= SOLID).sum())

    def is_clearly_larger(self, other: PlacedPicture) -> bool:
        return all(mine >= CLEARLY_LARGER * theirs for mine, theirs in zip(self.sizes, other.sizes, strict=True))


@dataclass(frozen=True)
class Scene:
    layout: str  # single | scattered | row
    size: int  # of the canvas, pixels
    pictures: list[PlacedPicture]


def draw_scene(rng: np.random.Generator, gallery: Gallery, cast: Cast, layout: str, number: int, size: int) -> Scene:
    """A scene of ``number`` different concepts, each in a style of its own, drawn until the cast can play it."""
    while True:
        squares = _LAYOUTS[layout](rng, number, size, cast)
        places = [_place_of(square, size) for square in squares]
        chosen = _choose(rng, cast, places)
        if chosen is not None:
            break
    pictures = []
    for concept, place, (left, top, side) in zip(chosen, places, squares, strict=True):
        style = cast.styles[int(rng.integers(len(cast.styles)))]
        tile = _scaled(gallery.sprites[style][concept], side)
        height, width = tile.shape[:2]
        left, top = left + (side - width) // 2, top + (side - height) // 2  # in the middle of its square
        colour = gallery.colours[style][concept]
        pictures.append(PlacedPicture(gallery.concepts[concept], style, colour, place, left, top, tile))
    return Scene(layout, size, pictures)


def _choose(rng: np.random.Generator, cast: Cast, places: list[int]) -> list[int] | None:
    """A different concept for each place, of those that the cast may show there; None where one has no choice left."""
    chosen: list[int] = []
    for place in places:
        possible = cast.by_place[place]
        if not set(possible) - set(chosen):
            return None
        while (concept := possible[int(rng.integers(len(possible)))]) in chosen:
            pass
        chosen.append(concept)
    return chosen


def _single(rng: np.random.Generator, number: int, size: int, cast: Cast) -> list[tuple[int, int, int]]:
    side = _side(rng, SINGLE, size)
    least = max(0, -(-size // GRID) - side // 2)  # the middle stays in the center's cell
    most = min(size - side, 2 * size // GRID - 1 - side // 2)
    left, top = (int(v) for v in rng.integers(least, most + 1, 2))
    return [(left, top, side)]


def _scatter(rng: np.random.Generator, number: int, size: int, cast: Cast) -> list[tuple[int, int, int]]:
    cells = [cell for cell in range(NUM_PLACES) if cell != CENTER or not cast.outer_places]
    cell_size = size // GRID
    squares = []
    for cell in rng.choice(cells, size=number, replace=False):
        side = _side(rng, SCATTERED, cell_size)
        left, top = (int(v) for v in rng.integers(cell_size - side + 1, size=2))
        squares.append((int(cell) % GRID * cell_size + left, int(cell) // GRID * cell_size + top, side))
    return squares


def _line_up(rng: np.random.Generator, number: int, size: int, cast: Cast) -> list[tuple[int, int, int]]:
    part = size // number
    sides = [_side(rng, ROW, min(part, size // 3)) for _ in range(number)]
    middle = int(rng.integers(max(sides) // 2, size - max(sides) // 2))
    squares = []
    for index, side in enumerate(sides):
        left = index * part + int(rng.integers(part - side + 1))
        top = middle - side // 2 + int(rng.integers(-side // 8, side // 8 + 1))
        squares.append((left, min(max(top, 0), size - side), side))
    return squares


_LAYOUTS = {"single": _single, "scattered": _scatter, "row": _line_up}


def _side(rng: np.random.Generator, bounds: tuple[float, float], whole: int) -> int:
    least, most = (int(bound * whole) for bound in bounds)
    return int(rng.integers(least, most + 1))


def _place_of(square: tuple[int, int, int], size: int) -> int:
    left, top, side = square
    column, row = (min(GRID * (2 * start + side) // (2 * size), GRID - 1) for start in (left, top))
    return row * GRID + column


def _scaled(sprite: np.ndarray, side: int) -> np.ndarray:
    height, width = sprite.shape[:2]
    longer = max(height, width)
    measures = (max(1, width * side // longer), max(1, height * side // longer))
    return np.asarray(Image.fromarray(sprite).resize(measures, Image.Resampling.BICUBIC))


def render(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The image, uint8 [size, size, 3], and the mask, uint8 [size, size]: 0, or 1 + index of the picture."""
    canvas = _background(rng, scene)
    mask = np.zeros((scene.size, scene.size), np.uint8)
    for instance, placed in enumerate(scene.pictures, start=1):
        x0, y0, x1, y1 = placed.box
        window = np.s_[y0:y1, x0:x1]
        opacity = placed.tile[..., 3:].astype(np.int64)
        canvas[window] = (canvas[window] * (255 - opacity) + placed.tile[..., :3] * opacity + 127) // 255
        mask[window][placed.tile[..., 3] >= SOLID] = instance
    return canvas.astype(np.uint8), mask


def _background(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """A colour that changes slowly from top to bottom, with a few strokes and specks in shades near it; int64."""
    base = _backdrop(rng, [_brightness(placed.tile) for placed in scene.pictures])
    top, bottom = (np.clip(base + rng.integers(-12, 13, 3), 0, 255) for _ in range(2))
    rows = np.arange(scene.size)[:, None]
    blend = (top * (scene.size - 1 - rows) + bottom * rows) // (scene.size - 1)
    canvas = Image.fromarray(np.repeat(blend[:, None].astype(np.uint8), scene.size, axis=1))
    pen = ImageDraw.Draw(canvas)
    reach = scene.size // 4

    def shade() -> tuple[int, ...]:
        return tuple(int(v) for v in np.clip(base + rng.integers(-30, 31, 3), 0, 255))

    for _ in range(int(rng.integers(0, 6))):
        x, y = (int(v) for v in rng.integers(0, scene.size, 2))
        dx, dy = (int(v) for v in rng.integers(-reach, reach + 1, 2))
        pen.line((x, y, x + dx, y + dy), fill=shade())
    for x, y in rng.integers(0, scene.size, (int(rng.integers(0, 20)), 2)):
        pen.point((int(x), int(y)), fill=shade())
    return np.asarray(canvas).astype(np.int64)


def _backdrop(rng: np.random.Generator, pictures: list[int]) -> np.ndarray:
    """A colour that every picture stands out from, or the one of thirty that comes nearest to it."""
    best, distance = np.zeros(3, np.int64), -1
    for _ in range(30):
        colour = rng.integers(0, 256, 3)
        brightness = int(colour @ _LUMA) // 1000
        nearest = min(abs(brightness - picture) for picture in pictures)
        if nearest > distance:
            best, distance = colour, nearest
        if distance >= STANDS_OUT:
            break
    return best


_LUMA = np.array([299, 587, 114])  # thousandths of a colour's brightness


def _brightness(tile: np.ndarray) -> int:
    solid = tile[tile[..., 3] >= SOLID][:, :3].astype(np.int64)
    return int((solid @ _LUMA).sum() // (1000 * max(1, len(solid))))
