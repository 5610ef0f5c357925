"""What ``nemo-pre data features`` writes, and what the loader reads of it."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from nemo_pre.data.dataset import ConversationDataset
from nemo_pre.data.errors import SampleError
from nemo_pre.data.features import CachedFeatures, read_features
from nemo_pre.data.manifest import read_manifest
from nemo_pre.features import encode
from nemo_pre.features.tower import tower_weights
from nemo_pre.features.writer import ShardFeatures
from nemo_pre.neva.vision import VisionTowerConfig
from tests.data.prepared_sets import image_bytes, preprocessing, sample, write_set
from tests.features.made import make, run_config, small_set


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """Data and float32 features; not to be changed."""
    directory = tmp_path_factory.mktemp("features")
    data, features = small_set(directory / "data"), directory / "features"
    assert make(data, features, "dtype=float32") == 0
    return data, features


@pytest.fixture
def copied(made, tmp_path) -> tuple[Path, Path]:
    return made[0], Path(shutil.copytree(made[1], tmp_path / "features"))


def dataset(data: Path, features: Path | None, on_error: str = "raise", **options: object) -> ConversationDataset:
    how = preprocessing(features=None if features is None else str(features), **options)
    return ConversationDataset(read_manifest(data), "train", how, on_error)


def slow_features(data: Path, position: int) -> list[torch.Tensor]:
    """Decoded, normalised and encoded one by one, by hand."""
    config = run_config(data, None)
    weights, _ = tower_weights(config)
    tower = VisionTowerConfig(config.model.vision, seed=0).configure_model().eval()
    tower.load_state_dict(weights)
    how = preprocessing()
    raw = ConversationDataset(read_manifest(data), "train", how).samples.read(position)
    found = []
    for image in raw.images:
        pixels = (how.encode_image(image, raw.where) - 0.166) / 0.148
        with torch.no_grad():
            found.append(tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    return found


def test_every_sample_has_the_encoders_output_of_its_own_images_and_nothing_else_changes(made):
    data, features = made
    plain, cached = dataset(data, None), dataset(data, features)
    assert [len(cached[n].images) for n in range(6)] == [0, 1, 2, 0, 1, 2]
    for position in range(len(plain)):
        one, other = plain[position], cached[position]
        assert (one.key, one.tokens, one.labels) == (other.key, other.tokens, other.labels)
        for found, expected in zip(other.images, slow_features(data, position), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert other.pixels == []
    with_pixels = dataset(data, features, pixels=True)[2]
    assert [tuple(image.shape) for image in with_pixels.images] == [(1, 4, 12)] * 2
    assert all(map(torch.equal, with_pixels.pixels, plain[2].images))


def test_a_file_is_one_that_safetensors_reads(made):
    _, features = made
    first = sorted(read_features(features).files.values(), key=lambda file: file.path)[0]
    with safe_open(first.path, framework="pt") as file:
        assert file.get_tensor("image_ends").tolist() == [0, 1, 3, 3, 4, 6, 6, 7]
        assert file.get_tensor("features").shape == (7, 4, 12)
        assert file.metadata() == {"shard_sha256": first.shard_sha256}
    assert first.path.stat().st_size == first.bytes
    assert json.loads((features / "features.json").read_text())["shards"][first.shard_sha256]["bytes"] == first.bytes


def test_bfloat16_is_the_default_and_half_the_bytes(made, tmp_path):
    data, features = made
    assert make(data, tmp_path / "half") == 0
    (whole,), (half,) = (dataset(data, place)[1].images for place in (features, tmp_path / "half"))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=2e-2, atol=2e-2)
    sizes = [
        max(f.images * f.image_bytes for f in read_features(p).files.values()) for p in (features, tmp_path / "half")
    ]
    assert sizes[0] == 2 * sizes[1]


# --- killed, shared out, started twice ------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_a_killed_computation_goes_on_shard_by_shard_and_ends_with_the_same_bytes(made, tmp_path, monkeypatch):
    data, features = made
    right, calls = encode.Encoder.__call__, []

    def dies_in_the_second_shard(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(self, pixels)

    monkeypatch.setattr(encode.Encoder, "__call__", dies_in_the_second_shard)
    assert make(data, tmp_path / "f", "dtype=float32", "batch=3") == 130
    assert len(calls) == 4
    (first,) = (tmp_path / "f").glob("train*.safetensors")
    assert len(list((tmp_path / "f").glob("*.partial"))) == 1
    inode = first.stat().st_ino
    monkeypatch.undo()
    assert make(data, tmp_path / "f", "dtype=float32", "batch=3") == 0
    assert first.stat().st_ino == inode, "a finished shard was done again"
    assert not list((tmp_path / "f").glob("*.partial"))
    assert contents(tmp_path / "f").keys() == contents(features).keys()
    assert make(data, tmp_path / "again", "dtype=float32", "batch=3") == 0
    assert contents(tmp_path / "f") == contents(tmp_path / "again")


def test_parts_make_the_whole_and_two_processes_do_not_write_one_file(made, tmp_path, capsys):
    data, features = made
    assert make(data, tmp_path / "f", "dtype=float32", "part=2/2") == 0
    done = contents(tmp_path / "f")
    assert 1 < len(done) < len(contents(features))
    (busy, *_) = (file for file in read_features(tmp_path / "f").files.values() if not file.is_whole)
    images = [0] * (busy.samples - 1) + [busy.images]
    with ShardFeatures(busy, images):
        assert make(data, tmp_path / "f", "dtype=float32", "part=1/2") == 0
        assert "1 shard(s) are being done by other processes" in capsys.readouterr().err
        assert not busy.path.exists()
    assert make(data, tmp_path / "f", "dtype=float32") == 0
    assert contents(tmp_path / "f") == contents(features)


def test_a_dry_run_counts_the_bytes_writes_nothing_and_a_full_disk_is_refused(made, tmp_path, capsys, monkeypatch):
    data, features = made
    total = sum(file.bytes for file in read_features(features).files.values())
    assert make(data, tmp_path / "f", "dtype=float32", "dry_run=true") == 0
    assert not (tmp_path / "f").exists()
    assert f"4 shards, 19 images of 4 x 12 float32, {total / 1e6:,.1f} MB" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)._replace(free=total - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for word in ("dry_run=true", "dry_run=false"):
        assert make(data, tmp_path / "f", "dtype=float32", word) == 2
        assert "needs 0.0 MB more and its disk has 0.0 MB free" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=total))
    assert make(data, tmp_path / "f", "dtype=float32") == 0


def test_a_disk_that_fills_up_ends_it_with_a_sentence(made, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardFeatures, "add", full)
    assert make(made[0], tmp_path / "f") == 2
    assert f"The disk of {tmp_path / 'f'} is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word, sentence",
    [
        ("dtype=float16", "dtype=float16 is unknown"),
        ("part=3/2", "part=3/2 is not K/N"),
        ("batch=0", "batch=0 must be"),
        ("optim.freeze_vision=false", "set optim.freeze_vision=true"),
        ("data.max_tiles=4", "data.features holds one tile an image"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(word, sentence, made, tmp_path, capsys):
    assert make(made[0], tmp_path / "f", word, "trainer.val_samples=0") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_another_encoder_or_type_does_not_go_into_the_same_directory(copied, capsys):
    data, features = copied
    for word, what in (
        ("dtype=bfloat16", "another dtype"),
        ("data.image_resize=pad", "another data.image_resize"),
        ("seed=2", "another the weights"),
    ):
        assert make(data, features, *(["dtype=float32"] if "dtype" not in word else []), word) == 2
        assert what in capsys.readouterr().err


# --- bad samples ----------------------------------------------------------------------------------------------------


def test_an_unreadable_image_is_passed_over_like_without_features(tmp_path, capsys):
    broken = {3: b"\x89PNG\r\n but nothing of a picture", 11: image_bytes(9, size=(60, 60))[:40]}
    samples = [sample(f"s{n}", [image_bytes(n), broken.get(n, image_bytes(n + 100))]) for n in range(20)]
    data = write_set(tmp_path / "data", samples)
    assert make(data, tmp_path / "f", "dtype=float32") == 0
    assert "2 sample(s) have unreadable images" in (said := capsys.readouterr().err)
    assert "no features: sample s3 of" in said
    plain, cached = dataset(data, None, "skip"), dataset(data, tmp_path / "f", "skip")
    assert [cached[n].key for n in range(20)] == [plain[n].key for n in range(20)]
    assert cached.counts() == plain.counts() == {"skipped": 2, "cut": 0}
    assert cached[3].key == "s4"
    with pytest.raises(SampleError, match=r"sample s3 of .*train-00000.tar has an image that could not be decoded"):
        dataset(data, tmp_path / "f")[3]


def test_damaged_features_are_a_bad_sample_with_their_place(copied):
    data, features = copied
    file = next(f for f in read_features(features).files.values() if f.path.name.startswith("train-00000"))
    place = file.features_at + 2 * file.image_bytes + 5  # the second image of sample 2
    content = bytearray(file.path.read_bytes())
    content[place] ^= 1
    file.path.write_bytes(content)
    with pytest.raises(SampleError, match=rf"sample s2 of .* damaged at byte {place - 5} \(image 2\)"):
        dataset(data, features)[2]
    assert dataset(data, features, "skip")[2].key == "s3"


def test_a_file_that_is_cut_while_it_is_read_is_a_bad_sample(copied):
    data, features = copied
    reading = dataset(data, features)
    file = reading.features.files[0]
    reading[1]
    with file.path.open("r+b") as out:
        out.truncate(file.features_at + 4 * file.image_bytes)
    assert reading[4].key == "s4", "its image lies before the cut"
    with pytest.raises(SampleError, match=r"sample s5 of .* ends inside the features of image 4"):
        reading[5]


def test_cut_missing_and_foreign_files_are_refused_before_anything_is_read(copied):
    data, features = copied
    shards = read_manifest(data).shards["train"]
    file = CachedFeatures(features, shards).files[1]
    content = file.path.read_bytes()
    file.path.write_bytes(content[: file.features_at + 3 * file.image_bytes + 1])
    with pytest.raises(ValueError, match=rf"{file.path.name} has .* bytes instead of .*, it ends at image 3 of"):
        CachedFeatures(features, shards)
    file.path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="goes on behind its end"):
        CachedFeatures(features, shards)
    file.path.unlink()
    with pytest.raises(ValueError, match=rf"{file.path.name} is missing: compute it with nemo-pre data features"):
        CachedFeatures(features, shards)
    file.path.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=r"is not what features.json says of it"):
        CachedFeatures(features, shards).read(8, "sample 8")
    ends = np.frombuffer(content, "<i8", file.samples, len(file.header)).copy()
    ends[2] = 99
    file.path.write_bytes(content[: len(file.header)] + ends.tobytes() + content[file.checksums_at :])
    with pytest.raises(ValueError, match="broken image_ends"):
        CachedFeatures(features, shards).read(9, "sample 9")


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"format": "nemo-pre features"}'])
def test_a_manifest_that_is_none_is_refused(copied, text):
    _, features = copied
    (features / "features.json").write_text(text)
    with pytest.raises(ValueError, match="is not a manifest of nemo-pre features version 1"):
        read_features(features)
