"""The pictures of all concepts in all styles, cut out and scaled, and the colour that each mostly has.

A picture is cropped to what is opaque in it, so that places and sizes are those of the thing and not of its margin,
and scaled down to :data:`SIDE` pixels, so that sharpness does not tell one style's packages from another's.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.emoji.concepts import Concept
from data_prep.emoji.packages import Package

SIDE = 64  # pixels of a picture's longer side, at most
RASTER = 96  # pixels that an SVG is drawn at, before it is cropped
SOLID = 128  # a pixel belongs to the thing from this opacity (of 255) up
FEWEST_SOLID = 32  # pixels of a picture that shows something

# A pixel's colour: dark, pale or grey ones first, then by hue (Pillow's, 256 around the circle) up to a bound.
DARK, PALE, GREY = 60, 215, 45  # of value, value and saturation
HUES = ((11, "red"), (29, "orange"), (48, "yellow"), (118, "green"), (184, "blue"), (206, "purple"), (244, "pink"))
BROWN = 165  # a value below which orange is brown, and red unless it is full
FULL, PINK = 190, 140  # saturation from which a dark red stays red, and below which a light one is pink
COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
CLEAR, SECOND = 0.55, 0.25  # shares of a picture: of its colour at least, of the next one at most


@dataclass(frozen=True)
class Gallery:
    """``sprites`` uint8 [height, width, 4] and ``colours`` (None: of no clear colour) by style, in the order of
    ``concepts``."""

    concepts: list[Concept]
    sprites: dict[str, list[np.ndarray]]
    colours: dict[str, list[str | None]]


def load_gallery(concepts: list[Concept], packages: Sequence[Package]) -> Gallery:
    """Decodes every concept's picture of every package.

    Raises:
        ValueError: a picture is damaged or empty, or there are SVGs and no resvg-py to draw them.
    """
    sprites = {package.style: [_sprite(package, concept) for concept in concepts] for package in packages}
    colours = {style: [main_colour(sprite) for sprite in sprites[style]] for style in sprites}
    return Gallery(concepts, sprites, colours)


def _sprite(package: Package, concept: Concept) -> np.ndarray:
    file = package.pictures[concept.code]
    content = package.files[file]
    try:
        picture = Image.open(io.BytesIO(_drawn(content) if file.endswith(".svg") else content)).convert("RGBA")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{package.path} holds SVG pictures, and resvg-py, which draws them, is not installed: "
            'pip install "nemo-pre[emoji]"'
        ) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{package.path}: {file} is not a picture ({error}); fetch the package again") from error
    box = picture.getchannel("A").point([255 * (opacity >= SOLID) for opacity in range(256)]).getbbox()
    if box is not None:
        picture = picture.crop(box)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    if box is None or int((pixels[..., 3] >= SOLID).sum()) < FEWEST_SOLID:
        raise ValueError(f"{package.path}: {file} shows nothing; fetch the package again")
    return pixels


def _drawn(svg: bytes) -> bytes:
    """A PNG of it. Fonts of this machine have no part in it, so that every machine draws the same."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=RASTER, height=RASTER, skip_system_fonts=True))


def main_colour(sprite: np.ndarray) -> str | None:
    """The colour of most of a picture's opaque pixels; None where it is too little, or another comes near it."""
    shares = colour_shares(sprite)
    ranked = sorted(COLOURS, key=lambda colour: -shares[colour])
    return ranked[0] if shares[ranked[0]] >= CLEAR and shares[ranked[1]] <= SECOND else None


def colour_shares(sprite: np.ndarray) -> dict[str, float]:
    """The share of each of :data:`COLOURS` among a picture's opaque pixels."""
    solid = sprite[..., 3] >= SOLID
    hue, saturation, value = np.asarray(Image.fromarray(sprite[..., :3]).convert("HSV"))[solid].T.astype(int)
    names = np.full(hue.shape, "red", dtype="<U6")  # what is left beyond the last bound
    for bound, name in reversed(HUES):
        names[hue < bound] = name
    names[(names == "orange") & (value < BROWN)] = "brown"
    names[(names == "red") & (value < BROWN) & (saturation < FULL)] = "brown"
    names[(names == "red") & (value >= BROWN) & (saturation < PINK)] = "pink"
    names[saturation < GREY] = "grey"
    names[(saturation < GREY) & (value >= PALE)] = "white"
    names[value < DARK] = "black"
    return {colour: float((names == colour).sum()) / len(names) for colour in COLOURS}
