"""A broken sample costs nothing but itself: it is named, counted and replaced, on every rank alike."""

from __future__ import annotations

import logging
import random
import re

import pytest

from nemo_pre.data.dataset import NAMED_SKIPS, ConversationDataset
from nemo_pre.data.manifest import read_manifest
from nemo_pre.nemo.data import ShardedVLMDataModule
from tests.data.prepared_sets import image_bytes, preprocessing, sample, write_set
from tests.data.test_exact_resume import GBS, MBS, keys, micro_batches

BROKEN = {
    "no image": lambda key: sample(key, [b"\x89PNG\r\n but nothing of a picture"]),
    "half an image": lambda key: sample(key, [image_bytes(9, size=(60, 60))[:40]]),
    "broken JSON": lambda key: (key, {"json": b'{"conversations": ['}),
    "another JSON": lambda key: (key, {"json": b"[1, 2]"}),
    "no question": lambda key: (key, {"json": b'{"conversations": [{"from": "gpt", "value": "x"}]}'}),
    "a number for a text": lambda key: (key, {"json": b'{"conversations": [{"from": "human", "value": 3}]}'}),
    "too few tags": lambda key: sample(key, [image_bytes(1), image_bytes(2)], "<image>"),
    "too many images": lambda key: sample(key, [image_bytes(1)] * 40),
}


@pytest.fixture
def half_broken(tmp_path):
    """60 samples of which every kind of breakage has hit some, and the keys of the sound ones."""
    rng = random.Random(3)
    kinds = list(BROKEN.values())
    broken = {number: kinds[n % len(kinds)] for n, number in enumerate(rng.sample(range(60), 24))}
    samples = [
        broken[n](f"broken-{n}") if n in broken else sample(f"sound-{n}", [image_bytes(n)] * (n % 3))
        for n in range(60)
    ]
    return write_set(tmp_path / "set", samples), [n for n in range(60) if n not in broken]


@pytest.mark.parametrize("kind", BROKEN)
def test_every_kind_of_breakage_names_key_shard_and_reason(kind, tmp_path, caplog):
    directory = write_set(tmp_path / "set", [BROKEN[kind]("k7"), sample("sound")])
    read = ConversationDataset(read_manifest(directory), "train", preprocessing(), on_error="skip")
    assert read[0].key == "sound"
    assert read.counts() == {"skipped": 1, "cut": 0}
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    said = record.getMessage()
    assert re.search(r"sample k7 of .*train-00000\.tar.* \w+.*; the next sample is read in its place$", said), said


def test_no_rank_waits_or_reads_otherwise_because_of_broken_samples(half_broken):
    """Three epochs on 1, 2 and 4 ranks: micro-batches are full, and a sample is replaced by the next sound one."""
    directory, sound = half_broken
    manifest = read_manifest(directory)
    sequences = {}
    for ranks, workers in ((1, 0), (2, 2), (4, 1)):
        read = []
        loaders = []
        for rank in range(ranks):
            module = ShardedVLMDataModule(
                manifest, preprocessing(), 120, MBS, GBS, num_workers=workers, on_error="skip"
            )
            module.collate = keys
            loaders.append(micro_batches(module, rank, ranks))
        for _ in range(180 // GBS * GBS // MBS // ranks):
            for loader in loaders:
                batch = next(loader)
                assert len(batch) == MBS
                read += batch
        sequences[ranks] = read
    assert sequences[1] == sequences[2] == sequences[4]
    assert set(sequences[1]) == {f"sound-{n}" for n in sound}
    dataset = ConversationDataset(manifest, "train", preprocessing(), on_error="skip")
    for number in range(60):
        following = next(n % 60 for n in range(number, 120) if n % 60 in sound)
        assert dataset[number].key == f"sound-{following}"


def test_the_log_names_the_first_and_then_every_hundredth(tmp_path, caplog):
    directory = write_set(tmp_path / "set", [BROKEN["broken JSON"]("k1"), sample("sound")])
    read = ConversationDataset(read_manifest(directory), "train", preprocessing(), on_error="skip")
    for _ in range(350):
        read[0]
    assert read.counts()["skipped"] == 350
    assert len(caplog.records) == NAMED_SKIPS + 3
    assert "number 300 of this loader" in caplog.records[-1].getMessage()
