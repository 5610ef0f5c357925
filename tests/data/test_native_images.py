"""Images that keep their aspect ratio: sizes, pixels and lengths are those of transformers' Qwen2VLImageProcessor."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from nemo_pre.data.collate import Collate
from nemo_pre.data.conversation import IMAGE_TOKEN_INDEX
from nemo_pre.data.dataset import ConversationDataset, Preprocessing
from nemo_pre.data.errors import SampleError
from nemo_pre.data.lengths import measure_lengths, read_lengths
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.native_images import NativeResolution
from nemo_pre.data.packed import PackedDataset
from tests.data.prepared_sets import sample, write_set
from tests.data.tokenizers import qwen_like

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIZES = [(56, 56), (640, 480), (480, 640), (100, 900), (31, 30), (1500, 1100), (333, 77)]  # width, height


def picture(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("least, most", [(4, 1280), (16, 64)])
@pytest.mark.parametrize("merge", [2, 1])
def test_sizes_and_pixels_are_those_of_transformers(size, least, most, merge):
    source = picture(*size)
    native = NativeResolution(14, merge, least, most)
    limits = {"min_pixels": least * native.side**2, "max_pixels": most * native.side**2}
    processor = Qwen2VLImageProcessor(merge_size=merge, **limits)
    expected = processor(Image.open(io.BytesIO(source)), return_tensors="pt")
    found = native.patches(source, *CLIP, "here", "bicubic")
    rows, columns = native.grid_of(source, "here")
    assert expected["image_grid_thw"].tolist() == [[1, merge * rows, merge * columns]]
    assert found.shape == (rows, columns, merge**2, 3 * 14**2) and least <= rows * columns <= most
    frames = expected["pixel_values"].view(rows * columns, merge**2, 3, 2, 14**2)
    assert torch.equal(frames[:, :, :, 0], frames[:, :, :, 1]), "both frames of a picture are equal"
    torch.testing.assert_close(found.flatten(0, 1), frames[:, :, :, 0].flatten(2), atol=1e-6, rtol=1e-6)


def test_a_token_is_the_square_of_pixels_at_its_place():
    pixels = np.zeros((8, 12, 3), dtype=np.uint8)
    pixels[4:8, 8:12] = 255  # row 1 and column 2 of 2 x 3 tokens of 4 x 4 pixels, four patches each
    found = NativeResolution(2, 2, 1, 6).patches(Image.fromarray(pixels), (0.0,) * 3, (1.0,) * 3, "here", "bicubic")
    assert found.shape == (2, 3, 4, 12)
    assert (found[1, 2] == 1).all() and found.sum() == found[1, 2].sum()
    pixels[4:6, 10:12] = 0  # its upper right patch
    found = NativeResolution(2, 2, 1, 6).patches(Image.fromarray(pixels), (0.0,) * 3, (1.0,) * 3, "here", "bicubic")
    assert found[1, 2].mean(-1).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("size, problem", [((5000, 20), "aspect ratio"), ((1400, 20), "too thin")])
def test_an_image_too_thin_for_the_limits_is_refused_by_name(size, problem):
    with pytest.raises(SampleError, match=f"sample 3 has an image of {size[0]} x 20 pixels.*{problem}"):
        NativeResolution(14, 2, 4, 16).grid_of(picture(*size), "sample 3")


def test_a_broken_image_is_refused():
    native = NativeResolution(14, 2, 4, 16)
    with pytest.raises(SampleError, match="here has an image that cannot be decoded"):
        native.grid_of(b"nonsense", "here")
    with pytest.raises(SampleError, match="here has an image that cannot be decoded"):
        native.patches(picture(60, 60)[:200], *CLIP, "here", "bicubic")


def preprocessing(sequence_length: int = 120, least: int = 1, most: int = 36) -> Preprocessing:
    native = NativeResolution(2, 2, least, most)
    return Preprocessing(
        qwen_like(), "chatml", sequence_length - least + 1, least, 0, (0.0,) * 3, (1.0,) * 3, native=native
    )


def pictures_set(directory, *sizes):
    samples = [sample(f"s{number}", [picture(*size) for size in images]) for number, images in enumerate(sizes)]
    return write_set(directory, samples)


def test_a_micro_batch_has_every_images_rows_and_its_grid(tmp_path):
    dataset = ConversationDataset(
        read_manifest(pictures_set(tmp_path / "set", [(12, 8), (4, 20)], [], [(24, 24)])), "train", preprocessing()
    )
    items = [dataset[number] for number in range(3)]
    batch = Collate(120, 0, native=True)(items)
    assert batch["media_grids"] == [(2, 3), (5, 1), (6, 6)] and batch["num_media_tiles"] == [1, 1, 1]
    assert batch["media"].shape == (6 + 5 + 36, 4, 12)
    assert torch.equal(batch["media"][6:11], items[0].images[1].flatten(0, 1))
    assert (batch["tokens"] == IMAGE_TOKEN_INDEX).sum(1).tolist() == [2, 0, 1]


def test_lengths_measured_from_headers_are_those_of_the_samples(tmp_path):
    """Also where the text is cut, and where the images alone do not fit."""
    path = pictures_set(tmp_path / "set", [(12, 8), (4, 20)], [], [(24, 24)], [(24, 24)] * 2, [(24, 24)] * 4)
    how, manifest = preprocessing(105), read_manifest(path)
    measure_lengths(manifest, how, workers=1)
    lengths = read_lengths(manifest, how).tolist()
    dataset = ConversationDataset(manifest, "train", how)
    items = [dataset[number] for number in range(4)]
    visual = [[6, 5], [], [36], [36] * 2]
    expected = [len(item.tokens) + sum(of) - len(of) for item, of in zip(items, visual, strict=True)]
    assert lengths == [*expected, 0] and expected[3] == 105
    with pytest.raises(SampleError, match=r"4 image\(s\) of 144 visual tokens.*lower model.vision.max_visual_tokens"):
        dataset[4]
    assert [item.key for item in PackedDataset(dataset)[(0, 1, 2)]] == ["s0", "s1"]


def test_lengths_of_other_limits_are_not_taken(tmp_path):
    manifest = read_manifest(pictures_set(tmp_path / "set", [(12, 8)]))
    measure_lengths(manifest, preprocessing(), workers=1)
    with pytest.raises(ValueError, match="measure them once"):
        read_lengths(manifest, preprocessing(most=12))
