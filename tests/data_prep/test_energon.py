"""Prepared data is a Megatron-Energon dataset and a plain WebDataset, as it lies there."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import webdataset
import yaml

from data_prep.energon import EMPTY, metadata_files
from data_prep.prepare import prepare
from tests.data_prep import layouts
from tests.data_prep.layouts import stored


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Images of three formats, text-only samples, and samples of several images."""
    folder = tmp_path_factory.mktemp("energon")
    layouts.llava_instruct(folder / "instruct")
    layouts.finevision(folder / "fv")
    (folder / "webp").mkdir()
    (folder / "webp" / "a.webp").write_bytes(layouts.picture(1, "WEBP"))
    line = {"image": "a.webp", "conversations": layouts.turns("<image>", "noise")}
    layouts.llava_jsonl(folder / "webp" / "w.jsonl", [line] * 3)
    names = ("instruct/llava_v1_5_mix665k.json", "fv", "webp/w.jsonl")
    (folder / "blend.yaml").write_text(yaml.dump({"sources": [{"path": name} for name in names]}))
    prepare(str(folder / "blend.yaml"), str(folder / "out"), val_samples=6, shard_samples=10, workers=1)
    return folder / "out"


def test_energons_loader_yields_every_sample_with_its_images_and_turns(prepared):
    from megatron.energon import VQASample, WorkerConfig, get_loader, get_train_dataset, get_val_dataset

    one_process = WorkerConfig(rank=0, world_size=1, num_workers=0)
    training = get_train_dataset(
        prepared,
        worker_config=one_process,
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
    )
    validation = get_val_dataset(prepared, worker_config=one_process, batch_size=1)
    for split, dataset in (("train", training), ("val", validation)):
        expected = stored(prepared, split)
        batches = list(itertools.islice(get_loader(dataset), len(expected)))
        assert {batch.__key__[0].split("/")[1] for batch in batches} == set(expected)
        for batch in batches:
            members = expected[batch.__key__[0].split("/")[1]]
            assert isinstance(batch, VQASample)
            num_images = len(members) - 1
            images = batch.image if num_images == 1 else batch.image[0]
            if num_images == 0:
                assert images is None
            else:
                assert [tuple(image.shape) for image in images] == [(3, 32, 40)] * num_images
                assert all(image.dtype == torch.float32 and 0 <= image.min() < image.max() <= 1 for image in images)
            assert len(batch.context[0]) == len(batch.answers[0]) >= 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["info"], "(47 samples,"),
        (["lint"], "Checking the index files..."),  # of train, val and test, of which there is none
    ],
)
def test_energons_commands_run(prepared, words, line):
    # In a process of its own: its loader looks at every object there is, and some of this one's do not like that.
    command = [str(Path(sys.executable).with_name("energon")), *words, str(prepared)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert line in output and "Error" not in output


def test_the_metadata_is_what_energons_own_preparator_writes(prepared, tmp_path):
    from megatron.energon.flavors import BaseWebdatasetFactory

    for tar in prepared.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    BaseWebdatasetFactory.prepare_dataset(
        tmp_path,
        sorted(tar.name for tar in tmp_path.glob("*.tar")),
        split_parts_patterns=[("train", "train-.*"), ("val", "val-.*")],
        workers=1,
    )
    theirs, ours = layouts.tree(tmp_path), layouts.tree(prepared)
    # Ours has a split more, without samples: Energon's own commands ask for it.
    info, split = (yaml.safe_load(ours.pop(f".nv-meta/{name}.yaml")) for name in (".info", "split"))
    assert info["shard_counts"].pop(EMPTY) == 0 and split["split_parts"].pop("test") == [EMPTY]
    assert [yaml.safe_load(theirs.pop(f".nv-meta/{name}.yaml")) for name in (".info", "split")] == [info, split]
    assert {name: content for name, content in ours.items() if name in theirs} == theirs
    assert "train-00000.tar.idx" in theirs


def test_the_demos_set_is_one_of_energons_too_and_nothing_that_lies_with_it_is_stray(tmp_path):
    from megatron.energon import WorkerConfig, get_loader, get_val_dataset

    from data_prep.digits.build import Parameters, build
    from data_prep.validate.check import check
    from data_prep.validate.content import Limits

    build(tmp_path / "out", Parameters(12, 0, 0.25, 5), workers=1)
    assert check(tmp_path / "out", Limits(), workers=1).findings == []
    for split, count in (("train", 9), ("val", 3), ("test", 0)):
        dataset = get_val_dataset(
            tmp_path / "out", split_part=split, worker_config=WorkerConfig(0, 1, 0), batch_size=1
        )
        batches = list(get_loader(dataset))
        assert len(batches) == count
        assert {batch.__key__[0].split("/")[-1] for batch in batches} == set(stored(tmp_path / "out", split))
        pictures = [batch.image for batch in batches if isinstance(batch.image, torch.Tensor)]
        assert {picture.shape[:2] for picture in pictures} == ({(1, 3)} if count else set())
    before = layouts.tree(tmp_path / "out")
    for lost in ("train-00001.tar.idx", ".nv-meta/split.yaml"):  # as of a set made before
        (tmp_path / "out" / lost).unlink()
        build(tmp_path / "out", Parameters(12, 0, 0.25, 5), workers=1)
        assert layouts.tree(tmp_path / "out") == before


def test_a_split_without_shards_is_one_without_samples():
    files = metadata_files({"train": {"shards": [{"file": "a.tar", "samples": 3}]}, "val": {"shards": []}})
    info, split = (yaml.safe_load(files[f".nv-meta/{name}.yaml"]) for name in (".info", "split"))
    assert split["split_parts"] == {"train": ["a.tar"], "val": [EMPTY], "test": [EMPTY]}
    assert info["shard_counts"] == {"a.tar": 3, EMPTY: 0}
    assert len(files[f"{EMPTY}.idx"]) == 8 and not any(files[EMPTY])


def test_plain_webdataset_reads_every_sample(prepared):
    urls = sorted(map(str, prepared.glob("train-*.tar")))
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    expected = stored(prepared)
    assert samples.keys() == expected.keys()
    for key, members in expected.items():
        assert {name: samples[key][name] for name in members} == members


def test_the_copied_sample_loader_needs_nothing_of_this_project(prepared):
    source = (prepared / ".nv-meta" / "sample_loader.py").read_text()
    assert "nemo_pre" not in source.replace("nemo-pre", "") and "data_prep" not in source
    assert Path(prepared / ".nv-meta" / "dataset.yaml").read_text().count("sample_loader.py") == 2
