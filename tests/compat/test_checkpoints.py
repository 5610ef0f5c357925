"""Distributed checkpoints on CPU ranks: saved, resharded, written in the background."""

from __future__ import annotations

import pytest

from tests.compat import checkpoint_ranks, layout_ranks
from tests.compat.tiny_gpt import Layout
from tests.ranks import run_ranks
from tests.ranks.sharded import assemble

RESUMED_LOSS = 1e-5  # float32 in another order of summation, amplified by up to two Adam steps
FULLY = "fully_reshardable"


@pytest.fixture(scope="module")
def weights():
    return assemble(run_ranks(layout_ranks.first_weights, 1, Layout()))


@pytest.fixture(scope="module")
def saved(weights, tmp_path_factory):
    """A checkpoint of TP2 x PP2 with the distributed optimizer, and the losses that followed it."""
    directory = tmp_path_factory.mktemp("saved")
    layout = Layout(tensor=2, pipeline=2, sequence=True, distributed_optimizer=True)
    results = run_ranks(checkpoint_ranks.train_save_train, 4, layout, weights, directory, FULLY)
    tensors, groups = run_ranks(checkpoint_ranks.contents, 1, directory)[0]
    return directory, tensors, groups, results[0][0]


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert tensor.equal(found[name]), name


def in_order(groups):
    return sorted(groups, key=lambda group: group["wd_mult"])


@pytest.mark.parametrize(
    "layout",
    [
        Layout(distributed_optimizer=True),
        Layout(data=2, distributed_optimizer=True),
        Layout(tensor=2, data=2, distributed_optimizer=True),
    ],
    ids=["1 rank", "data=2", "tensor=2 data=2"],
)
def test_checkpoint_of_tp2_pp2_loads_exactly_and_goes_on_elsewhere(saved, layout, tmp_path):
    directory, tensors, groups, losses = saved
    for state in ("exp_avg", "exp_avg_sq", "param"):
        assert any(f"optimizer.state.{state}." in name for name in tensors), sorted(tensors)
    assert [group["step"] for group in groups] == [3, 3]

    resumed = run_ranks(checkpoint_ranks.load_save_train, layout.ranks, layout, directory, tmp_path, FULLY)
    copied_tensors, copied_groups = run_ranks(checkpoint_ranks.contents, 1, tmp_path)[0]
    same(copied_tensors, tensors)
    assert in_order(copied_groups) == in_order(groups)
    for rank_losses in resumed:
        assert rank_losses == pytest.approx(losses, rel=RESUMED_LOSS)


@pytest.mark.parametrize(
    ("layout", "sharding"),
    [
        (Layout(data=2, distributed_optimizer=True), "dp_reshardable"),
        (Layout(tensor=2), "none"),
        (Layout(tensor=2, data=2, precision="bf16"), "none"),
        (Layout(data=2, distributed_optimizer=True, precision="bf16"), FULLY),
    ],
    ids=["dp_reshardable", "no distributed optimizer", "bf16", "bf16 distributed optimizer"],
)
def test_checkpoint_goes_on_on_the_same_ranks(weights, tmp_path, layout, sharding):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    results = run_ranks(checkpoint_ranks.train_save_train, layout.ranks, layout, weights, first, sharding)
    resumed = run_ranks(checkpoint_ranks.load_save_train, layout.ranks, layout, first, second, sharding)
    for (losses, _), rank_losses in zip(results, resumed, strict=True):
        assert rank_losses == losses


def test_background_writer_saves_the_state_of_its_step_while_training_goes_on(saved, weights, tmp_path):
    _, tensors, groups, losses = saved
    layout = Layout(tensor=2, pipeline=2, sequence=True, distributed_optimizer=True)
    results = run_ranks(checkpoint_ranks.train_save_train, 4, layout, weights, tmp_path, FULLY, True)
    for rank_losses, overlapped in results:
        assert rank_losses == losses
        assert overlapped, "the checkpoint was finished before training went on"
    written, written_groups = run_ranks(checkpoint_ranks.contents, 1, tmp_path)[0]
    same(written, tensors)
    assert in_order(written_groups) == in_order(groups)


def test_a_save_that_overtakes_another_leaves_both_complete(weights, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    layout = Layout(tensor=2, distributed_optimizer=True)
    run_ranks(checkpoint_ranks.two_saves_at_once, 2, layout, weights, first, second)
    full, _ = run_ranks(checkpoint_ranks.contents, 1, first)[0]
    model, _ = run_ranks(checkpoint_ranks.contents, 1, second)[0]
    assert len(full) == 4 * len(model)  # the optimizer holds three tensors more per parameter
    same({name: full[name] for name in model}, model)
