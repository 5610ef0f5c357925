"""Looking at an image's header, and writing it anew only where that is asked for or its format is unknown.

What is written anew is the picture that training sees (:mod:`nemo_pre.data.decoding`): upright, with 8 bits a channel,
without transparency. Files that are kept say by themselves how they stand.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_prep.prepare.candidate import BadSample
from data_prep.prepare.plan import Options
from nemo_pre.data.decoding import UnreadablePicture, decode, decode_labels, open_header, upright_size

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with further pictures
SAVE: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {"compress_level": 6},
    "WEBP": {"quality": 95, "method": 4},
}


@dataclass(frozen=True)
class Picture:
    content: bytes
    extension: str
    size: tuple[int, int]  # width and height of what is stored, upright
    original_size: tuple[int, int]


def checked_picture(content: bytes, name: str, options: Options) -> Picture:
    """The image as it is to be stored. Raises BadSample."""
    with _bad_sample(name):
        header = open_header(content)
        size = upright_size(header, content)
        shrunk = _shrunk_size(size, options.max_pixels)
        known = header.format in EXTENSIONS
        if shrunk == size and known and options.reencode is None:
            if options.verify_images:
                decode(content)
            return Picture(content, EXTENSIONS[str(header.format)], size, size)
        image = decode(content)
    stored = {"MPO": "JPEG"}.get(str(header.format), str(header.format)) if known else "PNG"
    encoding = options.reencode.upper() if options.reencode else stored
    written = image if image.size == shrunk else image.resize(shrunk, Image.Resampling.BICUBIC)
    return Picture(_encoded(written, encoding), EXTENSIONS[encoding], shrunk, size)


def checked_mask(content: bytes, picture: Picture, options: Options) -> bytes:
    """The PNG of labels, in the size of its stored picture, which stands upright. Raises BadSample."""
    with _bad_sample("the mask", "bad_mask", "bad_mask"):
        header = open_header(content)
        if header.format != "PNG" or header.mode not in ("L", "P", "I;16", "I"):
            raise BadSample("bad_mask", f"the mask is {header.format} in mode {header.mode}, not a PNG of labels")
        if header.size != picture.original_size:
            raise BadSample("bad_mask", f"the mask is {header.size} and its image {picture.original_size}")
        if header.size == picture.size:
            if options.verify_images:
                decode_labels(content)
            return content
        mask = decode_labels(content)
    return _encoded(mask.resize(picture.size, Image.Resampling.NEAREST), "PNG")


@contextmanager
def _bad_sample(
    name: str, undecodable: str = "undecodable_image", too_large: str = "too_many_pixels"
) -> Iterator[None]:
    """Turns what is wrong with a picture into the reason to drop its sample."""
    try:
        yield
    except UnreadablePicture as error:
        raise BadSample(too_large if error.too_large else undecodable, f"{name}: {error}") from error


def _shrunk_size(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    width, height = size
    if max_pixels is None or width * height <= max_pixels:
        return size
    scale = (max_pixels / (width * height)) ** 0.5
    width = min(max(int(width * scale), 1), max_pixels)
    return width, min(max(int(height * scale), 1), max_pixels // width)


def _encoded(image: Image.Image, encoding: str) -> bytes:
    buffer = io.BytesIO()
    image = image.convert("RGB") if encoding == "WEBP" else image  # which has no grey
    image.save(buffer, encoding, **SAVE[encoding])
    return buffer.getvalue()
