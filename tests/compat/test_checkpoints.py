"""Distributed checkpoints on CPU ranks: saved, resharded, written in the background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.compat import checkpoint_ranks, layout_ranks
from tests.compat.jobs import run_jobs
from tests.compat.tiny_gpt import Layout

RESUMED_LOSS = 1e-5  # float32 in another order of summation, amplified by up to two Adam steps
FULLY = "fully_reshardable"
SAVED = Layout(tensor=2, pipeline=2, sequence=True, distributed_optimizer=True)
ELSEWHERE = {
    "1 rank": Layout(distributed_optimizer=True),
    "data=2": Layout(data=2, distributed_optimizer=True),
    "tensor=2 data=2": Layout(tensor=2, data=2, distributed_optimizer=True),
}
SAME_RANKS = {
    "dp_reshardable": (Layout(data=2, distributed_optimizer=True), "dp_reshardable"),
    "no distributed optimizer": (Layout(tensor=2), "none"),
    "bf16": (Layout(tensor=2, data=2, precision="bf16"), "none"),
    "bf16 distributed optimizer": (Layout(data=2, distributed_optimizer=True, precision="bf16"), FULLY),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """By job, what each of its ranks returned, and what the checkpoints hold. SAVED's is written first; for each
    number of ranks one start does everything else."""
    root = tmp_path_factory.mktemp("checkpoints")

    def made(name: str) -> Path:
        directory = root / name.replace(" ", "_")
        directory.mkdir()
        return directory

    train, load = checkpoint_ranks.train_save_train, checkpoint_ranks.load_save_train
    ((weights,),) = run_jobs({"weights": (layout_ranks.first_weights, (Layout(),))}, 1).values()
    saved = made("saved")
    jobs: dict[int, dict[str, Any]] = {4: {"saved": (train, (SAVED, weights, saved, FULLY))}, 2: {}, 1: {}}
    jobs[4]["background"] = train, (SAVED, weights, made("background"), FULLY, True)
    for name, layout in ELSEWHERE.items():
        jobs[layout.ranks][name] = load, (layout, saved, made(name), FULLY)
    for name, (layout, sharding) in SAME_RANKS.items():
        first, second = made(f"{name} first"), made(f"{name} second")
        jobs[layout.ranks][f"{name} saved"] = train, (layout, weights, first, sharding)
        jobs[layout.ranks][f"{name} resumed"] = load, (layout, first, second, sharding)
    first, second = made("overtaken"), made("overtaking")
    two_saves = Layout(tensor=2, distributed_optimizer=True), weights, first, second
    jobs[2]["two saves"] = checkpoint_ranks.two_saves_at_once, two_saves
    jobs[2]["results server"] = checkpoint_ranks.modules_of_the_results_server, ()
    for name in ("saved", "background", *ELSEWHERE, "overtaken", "overtaking"):
        jobs[1][f"contents of {name}"] = checkpoint_ranks.contents, (root / name.replace(" ", "_"),)
    return {name: result for ranks in (4, 2, 1) for name, result in run_jobs(jobs[ranks], ranks).items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert tensor.equal(found[name]), name


def in_order(groups):
    return sorted(groups, key=lambda group: group["wd_mult"])


def test_a_checkpoint_holds_the_optimizer_beside_the_model(found):
    ((tensors, groups),) = found["contents of saved"]
    for state in ("exp_avg", "exp_avg_sq", "param"):
        assert any(f"optimizer.state.{state}." in name for name in tensors), sorted(tensors)
    assert [group["step"] for group in groups] == [3, 3]


@pytest.mark.parametrize("layout", ELSEWHERE)
def test_checkpoint_of_tp2_pp2_loads_exactly_and_goes_on_elsewhere(found, layout):
    ((tensors, groups),) = found["contents of saved"]
    ((copied_tensors, copied_groups),) = found[f"contents of {layout}"]
    same(copied_tensors, tensors)
    assert in_order(copied_groups) == in_order(groups)
    losses, _ = found["saved"][0]
    for rank_losses in found[layout]:
        assert rank_losses == pytest.approx(losses, rel=RESUMED_LOSS)


@pytest.mark.parametrize("kind", SAME_RANKS)
def test_checkpoint_goes_on_on_the_same_ranks(found, kind):
    for (losses, _), rank_losses in zip(found[f"{kind} saved"], found[f"{kind} resumed"], strict=True):
        assert rank_losses == losses


def test_background_writer_saves_the_state_of_its_step_while_training_goes_on(found):
    losses, _ = found["saved"][0]
    for rank_losses, overlapped in found["background"]:
        assert rank_losses == losses
        assert overlapped, "the checkpoint was finished before training went on"
    ((tensors, groups),) = found["contents of saved"]
    ((written, written_groups),) = found["contents of background"]
    same(written, tensors)
    assert in_order(written_groups) == in_order(groups)


def test_the_process_that_hands_results_on_does_not_import_torch(found):
    for maps in found["results server"]:
        assert "python" in maps and "libtorch" not in maps


def test_a_save_that_overtakes_another_leaves_both_complete(found):
    (((full, _),), ((model, _),)) = found["contents of overtaken"], found["contents of overtaking"]
    assert len(full) == 4 * len(model)  # the optimizer holds three tensors more per parameter
    same({name: full[name] for name in model}, model)
