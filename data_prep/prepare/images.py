"""Looking at an image's header, and writing it anew only where that is asked for or its format is unknown."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_prep.prepare.candidate import BadSample
from data_prep.prepare.plan import Options

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with further pictures
READ = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no format whose decoder runs other programs
MOST_PIXELS = 178_956_970  # beyond which Pillow takes an image for a decompression bomb
SAVE: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {"compress_level": 6},
    "WEBP": {"quality": 95, "method": 4},
}


@dataclass(frozen=True)
class Picture:
    content: bytes
    extension: str
    size: tuple[int, int]  # width and height as stored
    original_size: tuple[int, int]


def checked_picture(content: bytes, name: str, options: Options) -> Picture:
    """The image as it is to be stored. Raises BadSample."""
    image = _opened(content, name)
    size = image.size
    shrunk = _shrunk_size(size, options.max_pixels)
    known = image.format in EXTENSIONS
    if shrunk == size and known and options.reencode is None:
        if options.verify_images:
            _decode(image, name)
        return Picture(content, EXTENSIONS[str(image.format)], size, size)
    _decode(image, name)
    stored = {"MPO": "JPEG"}.get(str(image.format), str(image.format)) if known else "PNG"
    encoding = options.reencode.upper() if options.reencode else stored
    written = _resized(image, shrunk, encoding)
    return Picture(_encoded(written, encoding), EXTENSIONS[encoding], shrunk, size)


def checked_mask(content: bytes, picture: Picture, options: Options) -> bytes:
    """The PNG of labels, in the size of its stored picture. Raises BadSample."""
    try:
        mask = _opened(content, "the mask")
        if mask.format != "PNG" or mask.mode not in ("L", "P", "I;16", "I"):
            raise BadSample("bad_mask", f"the mask is {mask.format} in mode {mask.mode}, not a PNG of labels")
        if mask.size != picture.original_size:
            raise BadSample("bad_mask", f"the mask is {mask.size} and its image {picture.original_size}")
        if mask.size == picture.size:
            if options.verify_images:
                _decode(mask, "the mask")
            return content
        _decode(mask, "the mask")
    except BadSample as error:
        raise BadSample("bad_mask", error.detail) from error
    return _encoded(mask.resize(picture.size, Image.Resampling.NEAREST), "PNG")


def _opened(content: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=READ)
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels", f"{name}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError) as error:
        raise BadSample("undecodable_image", f"{name}: {_without_address(error)}") from error
    if image.width * image.height > MOST_PIXELS:
        raise BadSample("too_many_pixels", f"{name} has {image.width} x {image.height} pixels")
    if image.width < 1 or image.height < 1:
        raise BadSample("undecodable_image", f"{name} has {image.width} x {image.height} pixels")
    return image


def _decode(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels", f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them stumble over
        raise BadSample("undecodable_image", f"{name}: {_without_address(error)}") from error


def _without_address(error: Exception) -> str:
    """Pillow names the buffer it read by its address, which differs from run to run."""
    return "no known image format" if "cannot identify" in str(error) else str(error)


def _shrunk_size(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    width, height = size
    if max_pixels is None or width * height <= max_pixels:
        return size
    scale = (max_pixels / (width * height)) ** 0.5
    width = min(max(int(width * scale), 1), max_pixels)
    return width, min(max(int(height * scale), 1), max_pixels // width)


def _resized(image: Image.Image, size: tuple[int, int], encoding: str) -> Image.Image:
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    modes = {"JPEG": ("L", "RGB"), "PNG": ("L", "RGB", "RGBA"), "WEBP": ("RGB", "RGBA")}[encoding]
    if image.mode not in modes:
        image = image.convert("RGBA" if transparent and "RGBA" in modes else "RGB")
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, encoding: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **SAVE[encoding])
    return buffer.getvalue()
