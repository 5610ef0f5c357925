"""Whole runs on packed rows: exact resume, and every sample seen once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_pre.cli import main
from nemo_pre.config.compose import compose_run
from nemo_pre.data.dataset import ConversationDataset
from nemo_pre.data.lengths import read_lengths
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.packing import PackedStream, Packing
from nemo_pre.data.preprocessing import build_preprocessing
from nemo_pre.data.sampler import ShuffledStream
from tests.training.job import train
from tests.training.test_laver_training import lines


def overrides(output: Path, data: Path, *more: str) -> list[str]:
    return [
        "experiment=digits_tiny_pre",
        "parallel=single",
        f"output_dir={output}",
        f"data.path={data}",
        "platform=cpu",
        "data.packing=true",
        "data.packing_window=48",
        "data.sequence_length=192",
        "model.language.num_layers=2",
        "model.vision.num_layers=1",
        "objective.pre.layers=[1]",
        "trainer.max_steps=6",
        "trainer.checkpoint_every=3",
        "trainer.keep_checkpoints=9",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=2",
        "trainer.log_every=1",
        "trainer.val_samples=0",
        *more,
    ]


@pytest.fixture(scope="module")
def digits(digits, tmp_path_factory) -> Path:
    """A copy, beside which lengths are written."""
    return Path(shutil.copytree(digits, tmp_path_factory.mktemp("copied") / "digits"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, digits) -> Path:
    output = tmp_path_factory.mktemp("packed")
    given = overrides(output, digits)
    with pytest.raises(Exception, match="measure them once with nemo-pre data lengths"):
        train(1, given)
    assert main(["data", "lengths", *given]) == 0
    train(1, given)
    return output


@pytest.mark.parametrize("layout, ranks", [("parallel=dp2", 2), ("parallel=tp2_sp", 2)])
def test_a_packed_run_resumes_exactly_in_another_layout(layout, ranks, uninterrupted, digits, tmp_path):
    resumed = tmp_path / "resumed"
    checkpoints = resumed / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step=3").symlink_to(uninterrupted / "checkpoints" / "step=3")
    train(ranks, overrides(resumed, digits, layout), saves=False)
    expected, found = lines(uninterrupted), lines(resumed)
    for step in (4, 5, 6):
        assert found[step]["lm/loss"] == pytest.approx(expected[step]["lm/loss"], rel=2e-5), step


def test_packing_changes_the_data_state(uninterrupted, digits, tmp_path):
    """A resume with another window would read other rows: it is refused."""
    resumed = tmp_path / "resumed"
    checkpoints = resumed / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step=3").symlink_to(uninterrupted / "checkpoints" / "step=3")
    with pytest.raises(Exception, match="cannot go on with data.packing_window=24 .*packed into other rows"):
        train(1, overrides(resumed, digits, "data.packing_window=24"))


def test_a_row_holds_several_samples(uninterrupted, digits):
    """192 tokens hold at least three scenes of 36 visual tokens and a question."""
    manifest = read_manifest(digits)
    lengths = read_lengths(manifest, build_preprocessing(compose_run(overrides(uninterrupted, digits))))
    assert (lengths >= 1).all()
    stream = PackedStream(ShuffledStream(len(lengths), 0), Packing(lengths, 192, 48))
    assert all(len(stream[row]) >= 3 for row in range(20))
    assert stream.efficiency() > 0.8


def test_measured_lengths_are_those_of_the_items(uninterrupted, digits):
    how = build_preprocessing(compose_run(overrides(uninterrupted, digits)))
    manifest = read_manifest(digits)
    dataset = ConversationDataset(manifest, "train", how)
    lengths = read_lengths(manifest, how)
    for position in range(0, len(dataset), 7):
        item = dataset[position]
        visual = sum(len(image) * how.tile_tokens - 1 for image in item.images)
        assert lengths[position] == len(item.tokens) + visual
