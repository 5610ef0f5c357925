"""A checkpoint that finds no room ends the run with the user's error, and costs nothing that was saved before."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_pre.config.compose import compose_run
from nemo_pre.launch.ranks import RankFailure, launch
from nemo_pre.run_files.checkpoints import newest_step
from slurm.testbed.bed import losses
from tests.slurm.limited_files import LIMIT


def train(run: Path, data: Path, steps: int, *more: str) -> None:
    config = compose_run([
        "experiment=digits_tiny", "parallel=single", f"output_dir={run}", f"data.path={data}", "platform=cpu",
        "model.language.num_layers=2", "model.vision.num_layers=2", "trainer.log_every=1", "trainer.val_samples=0",
        "trainer.global_batch_size=8", "trainer.checkpoint_every=2", f"trainer.max_steps={steps}", *more,
    ])  # fmt: skip
    launch(config, "tests.slurm.limited_files:run_rank")


def test_a_checkpoint_without_room_ends_the_run_and_the_one_before_is_continued(digits, tmp_path):
    train(tmp_path, digits, 2)
    (tmp_path / LIMIT).write_text("1000000")  # a checkpoint's files are larger
    for in_background in ("true", "false"):
        with pytest.raises(RankFailure) as failure:
            train(tmp_path, digits, 4, f"trainer.async_checkpoint={in_background}")
        assert "ValueError: There is no room for the checkpoint of step 4" in str(failure.value)
        assert "which continues from step 2" in str(failure.value)
        assert newest_step(tmp_path / "checkpoints") == 2
    (tmp_path / LIMIT).unlink()
    train(tmp_path, digits, 4)
    assert newest_step(tmp_path / "checkpoints") == 4 and losses(tmp_path).keys() == {1, 2, 3, 4}
