"""Pixels against ``transformers``' slow image processors: equal but for the last bits of float32.

The tolerance is 1e-6, and a step of one in 255 is at least 0.0078 after normalisation.
"""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_pre.data.errors import SampleError
from nemo_pre.data.images import image_tensor, image_tiles

SIZE = 56
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
SIGLIP = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
SHAPES = [(56, 56), (120, 90), (90, 120), (57, 301), (301, 57), (20, 31), (1, 40), (640, 480), (56, 57)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng([width, height])
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = rng.integers(-20, 21, (height, width, 3))
    image = Image.fromarray(np.clip(np.asarray(coarse, int) + noise, 0, 255).astype(np.uint8))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def processors():
    from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

    square = {"height": SIZE, "width": SIZE}
    clip = {"image_mean": CLIP[0], "image_std": CLIP[1]}
    llava = {"size": {"shortest_edge": SIZE}, "crop_size": square, **clip}
    return {
        "clip whole": (CLIPImageProcessor(size=square, do_center_crop=False, **clip), CLIP, "whole", "bicubic"),
        "clip as published": (CLIPImageProcessor(**llava), CLIP, "crop", "bicubic"),
        "llava 1.5 pad": (LlavaImageProcessor(do_pad=True, **llava), CLIP, "pad", "bicubic"),
        "siglip": (SiglipImageProcessor(size=square, resample=3), SIGLIP, "whole", "bicubic"),
        "siglip2": (SiglipImageProcessor(size=square, resample=2), SIGLIP, "whole", "bilinear"),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["clip whole", "clip as published", "llava 1.5 pad", "siglip", "siglip2"])
def test_one_tile_is_the_processors(kind, shape):
    processor, (mean, std), resize, image_filter = processors()[kind]
    image = picture(*shape)
    expected = torch.from_numpy(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]))
    found = image_tensor(encoded(image), SIZE, mean, std, "here", resize, image_filter)
    assert found.shape == (3, SIZE, SIZE)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_of_colour_is_converted_as_transformers_does(mode):
    processor, (mean, std), resize, image_filter = processors()["clip as published"]
    image = picture(80, 70, mode)
    source = encoded(image, "TIFF") if mode == "CMYK" else encoded(image)
    expected = torch.from_numpy(processor(Image.open(io.BytesIO(source)), return_tensors="np")["pixel_values"][0])
    torch.testing.assert_close(
        image_tensor(source, SIZE, mean, std, "here", resize, image_filter), expected.float(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("max_tiles", [3, 5, 7, 13])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_llava_nexts(shape, max_tiles):
    from transformers import LlavaNextImageProcessor

    cells = max_tiles - 1
    grids = [[r * SIZE, c * SIZE] for r in range(1, cells + 1) for c in range(1, cells // r + 1)]
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=grids,
        image_mean=CLIP[0],
        image_std=CLIP[1],
    )
    image = picture(*shape)
    expected = torch.from_numpy(np.asarray(processor(image, return_tensors="np")["pixel_values"][0])).float()
    found = image_tiles(encoded(image), SIZE, *CLIP, "here", max_tiles)
    if len(expected) == 2:
        expected = expected[:1]  # a grid of one cell shows what the thumbnail shows
    assert 1 <= len(found) <= max_tiles
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_large_picture_has_several_tiles_and_a_small_one_has_not():
    counts = {shape: len(image_tiles(picture(*shape), SIZE, *CLIP, "here", 5)) for shape in SHAPES}
    assert counts[(56, 56)] == counts[(20, 31)] == 1
    assert counts[(640, 480)] == counts[(57, 301)] == 5
    assert counts[(120, 90)] == 5
    assert len(image_tiles(picture(640, 480), SIZE, *CLIP, "here", 1)) == 1


def test_broken_bytes_are_an_error_of_the_sample_whatever_the_decoder_does():
    rng = random.Random(0)
    broken = 0
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = encoded(picture(90, 70), kind)
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(rng.randint(1, 30)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            content = content[: rng.randint(1, len(content))] if rng.random() < 0.5 else content
            try:
                tensor = image_tensor(bytes(content), SIZE, *CLIP, "sample k1 of x.tar")
            except SampleError as error:
                broken += str(error).startswith("sample k1 of x.tar has an image that cannot be decoded (")
            else:
                assert tensor.shape == (3, SIZE, SIZE)
    assert broken > 150


def test_a_line_of_pixels_is_refused_where_it_would_be_resized_to_gigabytes():
    line = picture(3, 3000)
    assert image_tensor(line, SIZE, *CLIP, "here").shape == (3, SIZE, SIZE)
    assert len(image_tiles(line, SIZE, *CLIP, "here", 5)) >= 1
    for resize in ("crop", "pad"):
        with pytest.raises(SampleError, match="3 x 3000 pixels, too thin"):
            image_tensor(line, SIZE, *CLIP, "here", resize)
