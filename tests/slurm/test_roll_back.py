"""A roll-back leaves batches out, and nothing else in what the run learns tells that it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_pre.config.compose import compose_run
from nemo_pre.data.sampler import whole_position
from nemo_pre.launch.ranks import RankFailure, launch
from nemo_pre.run_files.skipped_samples import RECORD, read_skipped
from slurm.testbed.bed import losses
from tests.slurm.bad_batches import BAD_BATCHES

STEPS, EVERY, BATCH = 8, 3, 8


@pytest.fixture
def train(digits):
    """Runs two ranks, for which ``bad`` are the numbers of harmful batches."""

    def run(output: Path, *more: str, bad: str = "", factor: str = "nan") -> dict[int, float]:
        output.mkdir(exist_ok=True)
        (output / BAD_BATCHES).write_text(f"{bad}\n{factor}\n")
        config = compose_run([
            "experiment=digits_tiny", f"output_dir={output}", f"data.path={digits}", "platform=cpu",
            "model.language.num_layers=2", "model.vision.num_layers=2", f"trainer.max_steps={STEPS}",
            f"trainer.checkpoint_every={EVERY}", "trainer.keep_checkpoints=9", f"trainer.global_batch_size={BATCH}",
            "trainer.micro_batch_size=2", "trainer.log_every=1", "trainer.val_samples=0", *more,
        ])  # fmt: skip
        launch(config, "tests.slurm.bad_batches:run_rank")
        return losses(output)

    return run


def test_after_a_roll_back_the_losses_are_those_of_a_run_that_never_met_the_batches(train, tmp_path):
    nan = ["parallel=dp2", "trainer.nan_action=roll_back"]
    rolled_back = train(tmp_path / "a", *nan, bad="4")
    (skipped,) = read_skipped(str(tmp_path / "a"))
    assert (skipped.first, skipped.end, skipped.checkpoint_step, skipped.step) == (3 * BATCH, 5 * BATCH, 3, 5)
    assert "has the loss nan" in skipped.reason

    # By the record, from the first step on, and by the checkpoint behind them.
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / RECORD, tmp_path / "b")
    assert sorted(rolled_back) == list(range(1, STEPS + 1)) and train(tmp_path / "b", *nan) == rolled_back
    shutil.rmtree(tmp_path / "b" / "checkpoints" / f"step={STEPS}")
    (tmp_path / "b" / RECORD).unlink()
    assert train(tmp_path / "b", *nan) == rolled_back


def test_a_spike_is_found_across_pipeline_stages_and_a_second_one_too_many_stops_the_run(train, tmp_path):
    spike = [
        "parallel.pipeline=2", "trainer.spike_action=roll_back", "trainer.spike_factor=1.5", "trainer.spike_window=5",
        "trainer.async_checkpoint=true", "trainer.max_roll_backs=1",
    ]  # fmt: skip
    with pytest.raises(RankFailure, match="usual, and trainer.max_roll_backs=1 are done: lower optim.lr"):
        train(tmp_path, *spike, bad="4,7", factor="9")
    (skipped,) = read_skipped(str(tmp_path))
    assert (skipped.checkpoint_step, skipped.step) == (3, 5) and "is usual" in skipped.reason
    assert max(losses(tmp_path)) == 6, "batch 7 is step 6 after the roll-back"


def test_a_position_of_the_shortened_stream_is_the_place_of_its_sample_in_the_whole_one():
    skipped = [(10, 14), (12, 20), (3, 5), (20, 21)]
    left = [place for place in range(60) if not any(first <= place < end for first, end in skipped)]
    assert [whole_position(position, skipped) for position in range(40)] == left[:40]


def test_a_record_that_was_cut_is_no_record(tmp_path):
    line = {"first": 0, "end": 8, "data": "d", "shuffle_seed": 0, "checkpoint_step": 0, "step": 1, "reason": "r"}
    (tmp_path / RECORD).write_text(json.dumps(line) + "\n" + json.dumps(line)[:-5])
    assert len(read_skipped(str(tmp_path))) == 1
