"""A checkpoint whose files are not what they were when it was saved is not resumed from."""

from __future__ import annotations

import logging
import os

import pytest

from nemo_pre.run_files.checkpoints import SIZES, newest_checkpoint, record_sizes


@pytest.fixture
def checkpoints(tmp_path):
    """Steps 5 and 10."""
    for step in (5, 10):
        weights = tmp_path / f"step={step}" / "weights"
        weights.mkdir(parents=True)
        (weights / "0.distcp").write_bytes(b"x" * 100)
        (weights / ".metadata").write_bytes(b"y" * 10)
        record_sizes(tmp_path / f"step={step}")
    return tmp_path


def newest_step(directory):
    return (newest_checkpoint(directory) or "none").rpartition("=")[2]


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda step: cut(step / "weights" / "0.distcp"), "0.distcp has 99 bytes instead of 100"),
        (lambda step: (step / "weights" / ".metadata").unlink(), ".metadata is missing"),
        (lambda step: cut(step / SIZES), "sizes.json cannot be read"),
        (lambda step: (step / SIZES).write_text("[1]"), "sizes.json cannot be read"),
    ],
    ids=["cut", "missing", "cut sizes", "no sizes"],
)
def test_the_one_before_a_damaged_checkpoint_is_taken_and_that_is_said(checkpoints, caplog, damage, words):
    assert newest_step(checkpoints) == "10"
    damage(checkpoints / "step=10")
    with caplog.at_level(logging.WARNING):
        assert newest_step(checkpoints) == "5"
    assert "step=10 is damaged" in caplog.text and words in caplog.text


def test_a_checkpoint_without_recorded_sizes_is_taken_as_it_is(checkpoints):
    (checkpoints / "step=10" / SIZES).unlink()
    assert newest_step(checkpoints) == "10"


def test_an_unfinished_save_and_a_damaged_one_set_aside_are_passed_over(checkpoints):
    (checkpoints / "step=10-unfinished").touch()
    (checkpoints / "damaged-step=20-1").mkdir()
    assert newest_step(checkpoints) == "5"


def test_where_every_checkpoint_is_damaged_nothing_begins_anew_by_itself(checkpoints):
    for step in (5, 10):
        cut(checkpoints / f"step={step}" / "weights" / "0.distcp")
    with pytest.raises(ValueError, match="is damaged: restore the files of one, or move them away"):
        newest_checkpoint(checkpoints)
