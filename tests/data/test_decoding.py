"""One way from bytes to a picture: depths, modes, orientation, damage and limits, for whoever asks."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from nemo_pre.data.decoding import (
    DECODING,
    MOST_PIXELS,
    UnreadablePicture,
    decode,
    decode_labels,
    decoded,
    header_size,
    is_one_colour,
)
from nemo_pre.data.errors import SampleError
from nemo_pre.data.images import image_tensor
from nemo_pre.data.native_images import NativeResolution

RAMP = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(values: np.ndarray, **tags: int) -> bytes:
    """An uncompressed little-endian TIFF of one strip, with the tags that Pillow would not write."""
    height, width = values.shape
    content = values.astype(values.dtype.newbyteorder("<")).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = {
        256: width, 257: height, 258: 8 * values.dtype.itemsize, 259: 1, 262: tags.get("photometric", 1), 273: 8,
        277: 1, 278: height, 279: len(content), 339: kind,
    }  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    header = b"II*\0" + struct.pack("<I", 8 + len(content))
    return header + content + struct.pack("<H", len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("factor", [256, 257])
def test_grey_of_16_bits_keeps_its_high_byte_however_it_was_made_of_8(kind, factor):
    found = decode(encoded(Image.fromarray(RAMP.astype(np.uint16) * factor), kind))
    assert found.mode == "L" and (np.asarray(found) == RAMP).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.uint16) * 257, RAMP),
        (RAMP.astype(np.int32), RAMP),
        (RAMP.astype(np.int32) * 257, RAMP),
        (RAMP.astype(np.uint32) * 256, RAMP),
        (RAMP.astype(np.float32) / 255, RAMP),
        (RAMP.astype(np.float32), RAMP),
        (RAMP.astype(np.float32) * 257, RAMP),
        (np.zeros((4, 4), np.float32), np.zeros((4, 4), np.uint8)),
    ],
    ids=["u16", "i32 of 8", "i32 of 16", "u32 of 16", "f of 1", "f of 255", "f of 65535", "f of 0"],
)
def test_numbers_of_a_tiff_are_scaled_by_what_their_range_means(values, expected):
    assert (np.asarray(decode(tiff(values))) == expected).all()


def test_a_big_endian_tiff_one_of_which_white_is_0_and_one_of_12_bits():
    def big(values: np.ndarray) -> bytes:
        content = values.astype(">u2").tobytes()
        tags = {256: 16, 257: 16, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: len(content)}
        directory = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags.items())
        head = b"MM\0*" + struct.pack(">I", 8 + len(content))
        return head + content + struct.pack(">H", len(tags)) + directory + bytes(4)

    assert Image.open(io.BytesIO(big(RAMP))).mode == "I;16B"
    assert (np.asarray(decode(big(RAMP.astype(np.uint16) * 257))) == RAMP).all()
    inverted = tiff(RAMP.astype(np.uint16) * 257, photometric=0)
    assert (np.asarray(decode(inverted)) == 255 - RAMP).all()
    image = Image.fromarray(RAMP.astype(np.uint16) << 4)
    image.tag_v2 = {258: (12,)}  # as Pillow's reader leaves one
    assert (np.asarray(decode(image)) == RAMP).all()


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, np.nan], [0.0, np.inf], [0.0, 1e6]])
def test_numbers_that_are_no_pictures_are_refused_and_not_cut(values):
    with pytest.raises(UnreadablePicture, match="its values go from"):
        decode(tiff(np.array([values] * 2, np.float32)))
    if np.isfinite(values).all():
        with pytest.raises(UnreadablePicture, match="its values go from"):
            decode(tiff(np.array([values], np.float64).astype(np.int32) * 100_000))


def test_palettes_transparency_and_four_colours_are_what_transformers_makes_of_them():
    from transformers.image_transforms import convert_to_rgb

    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (9, 7, 4), dtype=np.uint8))
    palette = rgba.convert("RGB").quantize(5)
    cases = {
        "RGBA": encoded(rgba),
        "LA": encoded(rgba.convert("LA")),
        "P": encoded(palette),
        "P, one colour transparent": encoded(palette, transparency=2),
        "grey, one transparent": encoded(rgba.convert("L"), transparency=3),
        "1": encoded(rgba.convert("1")),
        "CMYK": encoded(rgba.convert("RGB").convert("CMYK"), "JPEG"),
        "GIF": encoded(palette, "GIF", transparency=1),
        "WebP": encoded(rgba, "WEBP", lossless=True, exact=True),
    }
    for name, content in cases.items():
        expected = np.asarray(convert_to_rgb(Image.open(io.BytesIO(content))).convert("RGB"))
        assert (np.asarray(decode(content).convert("RGB")) == expected).all(), name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_obeyed_as_serving_does_in_sizes_too_and_only_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    content = encoded(image, kind, exif=exif)
    opened = Image.open(io.BytesIO(content))
    opened.load()  # which turns a TIFF
    expected = ImageOps.exif_transpose(opened).convert("RGB")
    found = decode(content)
    assert (np.asarray(found) == np.asarray(expected)).all()
    assert header_size(content) == found.size == ((20, 30) if orientation > 4 else (30, 20))
    assert (np.asarray(decode(found)) == np.asarray(found)).all(), "a picture that was decoded is not turned again"
    assert NativeResolution(2, 1, 1, 500).grid_of(content, "here") == (found.height // 2, found.width // 2)
    how = ([0.0] * 3, [1.0] * 3, "here")
    assert (image_tensor(content, 8, *how) == image_tensor(expected, 8, *how)).all()


def test_exif_behind_a_pngs_pixels_is_found_and_a_cut_png_has_a_size_all_the_same():
    plain = encoded(Image.new("RGB", (30, 20), "red"))
    exif = Image.Exif()
    exif[0x0112] = 6
    late = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(late)) + b"eXIf" + late + struct.pack(">I", zlib.crc32(b"eXIf" + late))
    content = plain[:-12] + chunk + plain[-12:]
    assert header_size(content) == decode(content).size == (20, 30)
    assert header_size(plain[:60]) == (30, 20)


def test_broken_exif_hurts_nothing():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    plain = np.asarray(decode(encoded(image, "JPEG")))
    rng = random.Random(0)
    good = Image.Exif()
    good[0x0112] = 6
    for number in range(100):
        exif = bytearray(good.tobytes())
        for _ in range(rng.randint(1, 6)):
            exif[rng.randrange(6, len(exif))] = rng.randrange(256)
        content = encoded(image, "JPEG", exif=bytes(exif[: rng.randint(7, len(exif))] if number % 2 else exif))
        found = decode(content)
        assert header_size(content) == found.size
        assert np.asarray(found).shape in ((20, 30, 3), (30, 20, 3))
    for orientation in (0, 9, 65535):
        good[0x0112] = orientation
        assert (np.asarray(decode(encoded(image, "JPEG", exif=good))) == plain).all()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that states ``side`` x ``side`` pixels."""

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


@pytest.mark.parametrize("pillows_limit", [None, 933_120_000, 89_478_485, 1000])
def test_a_picture_of_too_many_pixels_is_refused_by_its_header_whatever_pillows_limit_is(pillows_limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    side = int(MOST_PIXELS**0.5) + 1
    for ask in (decode, header_size, lambda content: decoded(content, "here")):
        with pytest.raises(
            (UnreadablePicture, SampleError), match=rf"{side} x {side} pixels|exceeds limit"
        ) as refused:
            ask(bomb(side))
        assert isinstance(refused.value, SampleError) or refused.value.too_large
    if pillows_limit != 1000:
        assert header_size(bomb(side - 1)) == (side - 1, side - 1)


def test_padding_makes_no_bomb_of_a_long_picture():
    long = Image.new("L", (14_000, 80))
    assert image_tensor(long, 8, [0.0] * 3, [1.0] * 3, "here").shape == (3, 8, 8)
    with pytest.raises(SampleError, match="here has an image of 14000 x 80 pixels, which padded to a square are more"):
        image_tensor(long, 8, [0.0] * 3, [1.0] * 3, "here", "pad")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_cut_file_is_refused_whatever_pillow_was_told(kind, monkeypatch):
    content = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50), dtype=np.uint8)), kind)
    for tolerant in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
        with pytest.raises(SampleError, match="here has an image that cannot be decoded"):
            decoded(content[: len(content) // 2], "here")
        assert tolerant == ImageFile.LOAD_TRUNCATED_IMAGES


def test_no_other_format_is_opened_and_no_address_is_told():
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"", b"<html>", b"P6 1 1 255 abc"):
        with pytest.raises(UnreadablePicture, match=r"it is no JPEG, PNG, WEBP, GIF, BMP, TIFF file$"):
            decode(content)


def test_labels_are_numbers_and_not_colours():
    values = np.array([[0, 3], [250, 255]], np.uint8)
    coloured = Image.fromarray(values)
    coloured.putpalette([(7 * number) % 256 for number in range(768)])
    for content in (
        encoded(Image.fromarray(values)),
        encoded(coloured),
        encoded(Image.fromarray(values.astype("u2"))),
    ):
        assert (np.asarray(decode_labels(content)) == values).all()
    with pytest.raises(UnreadablePicture, match="its labels go from 0 to 300"):
        decode_labels(encoded(Image.fromarray(np.array([[0, 300]], np.uint16))))
    with pytest.raises(UnreadablePicture, match="mode RGB, whose pixels are no labels"):
        decode_labels(encoded(Image.new("RGB", (2, 2))))


def test_a_picture_that_comes_out_otherwise_has_another_version_of_decoding():
    """Stored features know by DECODING alone that pictures are others now: raise it, and add the digest."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    deep = rng.integers(0, 65536, (6, 5), dtype=np.uint16)
    palette = Image.fromarray(rng.integers(0, 4, (6, 5), dtype=np.uint8))
    palette.putpalette(range(0, 252, 21))
    exif = Image.Exif()
    exif[0x0112] = 8
    files = [
        encoded(colours, exif=exif),
        encoded(Image.fromarray(deep)),
        encoded(colours.convert("L")),
        encoded(palette, transparency=1),
        encoded(Image.fromarray(rng.integers(0, 256, (6, 5, 4), dtype=np.uint8))),
        tiff(deep),
        tiff(deep, photometric=0),
        tiff(deep.astype(np.int32)),
        tiff(deep.astype(np.float32) / 65535),
        tiff(deep.astype(np.float32)),
    ]
    digest = hashlib.sha256(b"".join(np.asarray(decode(content)).tobytes() for content in files)).hexdigest()
    assert {DECODING: digest[:16]} == {2: "8c38de299bd8a677"}


def test_one_colour_is_one_colour():
    picture = Image.new("RGB", (5, 4), (1, 2, 3))
    assert is_one_colour(picture) and is_one_colour(Image.new("L", (5, 4), 7))
    picture.putpixel((4, 3), (1, 2, 4))
    assert not is_one_colour(picture)
