"""NeMo's trainer, its Megatron strategy and NeVA on CPU ranks, with rank 0 printing its progress."""

from __future__ import annotations

import pytest

from tests.compat import nemo_ranks
from tests.compat.tiny_gpt import Layout
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tower")
    run_ranks(nemo_ranks.tower, 1, directory)
    return directory


@pytest.fixture(scope="module")
def saved(tower, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    layout = Layout(tensor=2, pipeline=2, sequence=True, distributed_optimizer=True)
    results = run_ranks(nemo_ranks.fit, 4, layout, tower, 6, directory)
    checkpoints = sorted(path for path in directory.iterdir() if (path / "weights" / "metadata.json").exists())
    # NeMo names a checkpoint by the step before; the second was still being written when training ended.
    assert [path.name for path in checkpoints] == ["step=2", "step=5"]
    losses = results[0][0]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    return checkpoints[0], losses


@pytest.mark.parametrize(
    "layout",
    [Layout(distributed_optimizer=True), Layout(data=2, distributed_optimizer=True)],
    ids=["1 rank", "data=2"],
)
def test_background_checkpoint_of_tp2_pp2_resumes_elsewhere(tower, saved, layout):
    checkpoint, losses = saved
    for found, _ in run_ranks(nemo_ranks.fit, layout.ranks, layout, tower, 6, None, checkpoint):
        assert found == pytest.approx(losses[3:], rel=1e-5)


def test_bf16_trains_with_the_distributed_optimizer(tower):
    layout = Layout(tensor=2, distributed_optimizer=True, precision="bf16")
    for losses, dtypes in run_ranks(nemo_ranks.fit, 2, layout, tower, 3):
        assert losses[-1] < losses[0]
        assert dtypes == ["torch.bfloat16"]
