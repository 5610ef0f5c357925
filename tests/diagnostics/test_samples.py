"""Which pictures are asked, what their masks mean, and what probes are fitted to."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.shards import ShardedSamples
from nemo_pre.diagnostics.samples import DiagnosticData, read_data
from tests.data_prep.layouts import coco_stuff


def raw_samples(digits: Path, split: str, data: DiagnosticData):
    samples = ShardedSamples(read_manifest(digits).shards[split])
    positions = data.fit if split == "train" else data.test
    return [(samples.read(n), samples.read_member(n, "mask.png")) for n in positions]


def test_text_only_samples_are_left_out_and_splits_kept_apart(digits):
    data = read_data(digits, num_fit=30, num_test=20)
    assert (len(data.fit), len(data.test)) == (30, 20)
    assert all(sample.key.startswith("train") for sample in data.fit_samples())
    assert all(sample.key.startswith("val") for sample in data.test_samples())
    texts = [n for n in range(60) if not data.train.read(n).images]
    assert texts and not set(texts) & set(data.fit)


def test_a_digits_mask_shows_digits_and_its_probes_their_presence_and_count(digits):
    data = read_data(digits, num_fit=40, num_test=15)
    assert [task.name for task in data.tasks] == ["presence", "count"] and data.background == 0
    for sample, (raw, mask) in zip(data.test_samples(), raw_samples(digits, "val", data), strict=True):
        placed = raw.record["scene"]["digits"]
        instances, classes = np.array(Image.open(io.BytesIO(mask))), np.array(sample.mask)
        for digit in placed:
            assert (classes[instances == digit["instance"]] == digit["digit"] + 1).all()
        assert (classes[instances == 0] == 0).all()
        presence, count = sample.truth.split([task.size for task in data.tasks])
        shown = {digit["digit"] + 1 for digit in placed}
        assert presence.tolist() == [float(number in shown) for number in data.presence]
        assert count.argmax() == len(placed) and count.sum() == 1
        assert sample.question.count("<image>") == 1


def test_coco_stuff_has_no_background_and_unlabelled_pixels_belong_to_nothing(tmp_path):
    from data_prep.prepare import prepare

    source = coco_stuff(tmp_path / "coco", count=40)
    for number, path in enumerate(sorted((tmp_path / "coco").rglob("*.png"))):
        mask = np.full((32, 40), 255, np.uint8)
        mask[:16], mask[16:, :20] = 0, 10 + number % 3  # class 0 is in every picture
        Image.fromarray(mask).save(path)
    prepare(str(source), str(tmp_path / "out"), val_samples=5, workers=1)
    data = read_data(tmp_path / "out", num_fit=30, num_test=5)
    assert data.background is None and data.presence == [10, 11, 12]
    assert [task.name for task in data.tasks] == ["presence"]
    for sample in data.test_samples():
        marked = np.array(sample.marked_mask)
        assert set(np.unique(marked[..., 0])) - {255} == {0, 10 + int(sample.truth.argmax())}
        assert (marked[..., 1] == 255).all() and sample.truth.sum() == 1


def test_a_label_of_the_records_is_a_class_and_one_the_fit_set_lacks_is_never_right(digits):
    data = read_data(digits, num_fit=20, num_test=20, label="id")
    task = data.tasks[-1]
    assert (task.name, task.size) == ("label", 21)
    assert torch.stack([sample.truth[-21:] for sample in data.fit_samples()]).sum(0).tolist() == [1.0] * 20 + [0.0]
    assert {int(sample.truth[-21:].argmax()) for sample in data.test_samples()} == {20}


def test_without_fit_pictures_there_is_nothing_to_probe_for(digits):
    assert read_data(digits, num_fit=0, num_test=3).tasks == []


def test_a_label_that_no_record_has_is_named(digits):
    with pytest.raises(ValueError, match="label=colour is in no record"):
        read_data(digits, num_fit=5, num_test=5, label="colour")
