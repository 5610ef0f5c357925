"""Samples with no image, one, or several, from the tar to the batch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nemo_pre.data.collate import Collate
from nemo_pre.data.conversation import IMAGE_TOKEN_INDEX
from nemo_pre.data.dataset import ConversationDataset
from nemo_pre.data.errors import SampleError
from nemo_pre.data.manifest import read_manifest
from tests.data.prepared_sets import SIZE, TILE_TOKENS, image_bytes, preprocessing, sample, write_set


def dataset(directory, sequence_length=120, **options):
    return ConversationDataset(read_manifest(directory), "train", preprocessing(sequence_length, **options))


def colours(tiles):
    """The colour of each tile, times 255."""
    return [round(float(tile.mean()) * 255) for tile in tiles]


def test_images_enter_the_batch_in_the_order_of_their_tags(tmp_path):
    """Twelve of them, for a member's number is a number: 10 comes after 9."""
    samples = [
        sample("none"),
        sample("one", [image_bytes(7)]),
        sample("twelve", [image_bytes(20 + n) for n in range(12)]),
        sample("two", [image_bytes(101), image_bytes(102)], "Is <image> like <image>?"),
    ]
    read = dataset(write_set(tmp_path / "set", samples))
    items = [read[number] for number in range(4)]
    assert [len(item.images) for item in items] == [0, 1, 12, 2]
    batch = Collate(117, padding_id=0)([items[3], items[0], items[2], items[1]])
    assert colours(batch["media"]) == [101, 102, *range(20, 32), 7]
    assert batch["num_media_tiles"] == [1] * 15
    assert (batch["tokens"] == IMAGE_TOKEN_INDEX).sum(1).tolist() == [2, 0, 12, 1]
    assert Collate(117, 0)([items[0]])["media"] is None


def test_an_image_of_several_tiles_keeps_its_place(tmp_path):
    samples = [sample("two", [image_bytes(9, size=(4 * SIZE, SIZE)), image_bytes(50)])]
    (item,) = [dataset(write_set(tmp_path / "set", samples), max_tiles=5)[0]]
    batch = Collate(117, padding_id=0)([item])
    assert batch["num_media_tiles"] == [5, 1]
    assert batch["media"].shape == (6, 3, SIZE, SIZE)
    assert colours(batch["media"]) == [9] * 5 + [50]
    assert (batch["tokens"] == IMAGE_TOKEN_INDEX).sum() == 2, "an image is one token, whatever its tiles"


def test_the_members_of_a_prepared_set_may_mix_formats(tmp_path):
    key, members = sample("mixed", [image_bytes(5), image_bytes(6)])
    members["1.jpg"], members["mask.png"] = image_bytes(200, "JPEG"), image_bytes(0)
    del members["1.png"]
    assert colours(image[0] for image in dataset(write_set(tmp_path / "set", [(key, members)]))[0].images) == [5, 200]


def test_what_does_not_fit_is_cut_or_refused_by_the_expanded_length(tmp_path):
    """A sample is cut to the text that is left beside its images, and never in the middle of one."""
    words = "What is shown " * 40
    samples = [sample(f"{n}", [image_bytes(n)] * n, "<image>\n" * n + words) for n in range(5)]
    samples.append(sample("late", [image_bytes(1), image_bytes(2)], f"<image>{words}<image>"))
    read = dataset(write_set(tmp_path / "set", samples), sequence_length=60)
    for n in range(5):
        item = read[n]
        expanded = len(item.tokens) + n * (TILE_TOKENS - 1)
        assert expanded == (60 if n else 60 - TILE_TOKENS + 1)
    assert read.counts()["cut"] == 5
    with pytest.raises(SampleError, match="sample late of .* is cut to 54 text tokens before its last image"):
        read[5]
    narrow = ConversationDataset(read_manifest(tmp_path / "set"), "train", preprocessing(TILE_TOKENS * 4))
    with pytest.raises(
        SampleError, match=r"sample 4 of .*4 image\(s\) of 16 visual tokens in all, which leave no room"
    ):
        narrow[4]


@pytest.mark.parametrize(
    "members, sentence",
    [
        ({"0.png": b"", "2.png": b""}, "holds the images 0.png, 2.png, which are not numbered from 0"),
        ({"png": b"", "0.png": b""}, "holds the images png, 0.png, which are not numbered"),
        ({"0.png": b""}, r"names the image\(s\) a, b but holds 1"),
        ({}, r"names the image\(s\) a, b but holds none"),
    ],
)
def test_images_that_are_missing_or_misnumbered_are_named(tmp_path, members, sentence):
    record = {"conversations": [], "images": ["a", "b"]}
    directory = write_set(tmp_path / "set", [("k1", {"json": json.dumps(record).encode(), **members})])
    with pytest.raises(SampleError, match=f"sample k1 of .*train-00000.tar {sentence}"):
        dataset(directory).samples.read(0)


def test_more_tags_than_images_and_fewer_are_named(tmp_path):
    samples = [sample("k1", [image_bytes(1)] * 2, "<image> What?"), sample("k2", [image_bytes(1)], "<image><image>")]
    read = dataset(write_set(tmp_path / "set", samples))
    with pytest.raises(SampleError, match=r"k1 .*has 2 image\(s\) and 1 <image> tag"):
        read[0]
    with pytest.raises(SampleError, match=r"k2 .*has 1 image\(s\) and 2 <image> tag"):
        read[1]


def test_hundreds_of_shards_are_read_with_a_bounded_number_of_open_files(tmp_path):
    read = dataset(write_set(tmp_path / "set", [sample(f"{n}") for n in range(600)], per_shard=2))
    for number in range(600):
        assert read.samples.read(number).key == str(number)
    files = Path("/proc/self/fd").iterdir()
    assert sum(str(tmp_path) in os.path.realpath(file) for file in files) <= 256
