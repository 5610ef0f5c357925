"""The sequence of samples of a job that is killed, resumed, and laid out anew."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from itertools import islice
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from nemo_pre.data.manifest import read_manifest
from nemo_pre.nemo.data import ShardedVLMDataModule
from tests.data.prepared_sets import preprocessing, text_set

GBS, MBS = 8, 2


@pytest.fixture(scope="module")
def how():
    return preprocessing()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sets")
    return [text_set(directory, name, count) for name, count in (("a", 23), ("b", 5), ("c", 11))]


def build(sets, how, weights=(3, 1, 2), **options) -> ShardedVLMDataModule:
    manifests = [read_manifest(path) for path in sets]
    module = ShardedVLMDataModule(
        manifests[0], how, 120, MBS, GBS, blend=list(zip(manifests, weights, strict=True)), **options
    )
    module.collate = keys
    return module


def keys(items) -> list[str]:
    return [item.key for item in items]


def micro_batches(module: ShardedVLMDataModule, rank: int, ranks: int):
    """What a data-parallel rank's loader gives; a loader knows its ranks when it is made."""
    from megatron.core import parallel_state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state, "get_data_parallel_rank", lambda: rank)
        patch.setattr(parallel_state, "get_data_parallel_world_size", lambda: ranks)
        return iter(module.data_sampler.transform_dataloader(module.train_dataloader()))


def steps(sets, how, ranks: int, workers: int, state: dict | None):
    """Endlessly: the keys of a global batch in the global order, and the state after it."""
    modules = [build(sets, how, num_workers=workers) for _ in range(ranks)]
    for module in modules:
        module.trainer = SimpleNamespace(global_step=state["global_step"] if state else 0)
        if state:
            module.load_state_dict(state["data"])
    loaders = [micro_batches(module, rank, ranks) for rank, module in enumerate(modules)]
    while True:
        read = [list(islice(loader, GBS // MBS // ranks)) for loader in loaders]
        for module in modules:
            module.trainer.global_step += 1
        states = [{"global_step": m.trainer.global_step, "data": m.state_dict()} for m in modules]
        assert all(one == states[0] for one in states)
        yield [key for batches in zip(*read, strict=True) for batch in batches for key in batch], states[0]


@pytest.fixture(scope="module")
def uninterrupted(sets, how) -> list[str]:
    return [key for read, _ in islice(steps(sets, how, 1, 0, None), 40) for key in read]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_sequence_is_the_same_for_every_layout_and_number_of_loaders(sets, how, uninterrupted, ranks, workers):
    read = [key for batch, _ in islice(steps(sets, how, ranks, workers, None), 12) for key in batch]
    assert read == uninterrupted[: 12 * GBS]


def load_until_killed(channel, sets, how, ranks, workers, state) -> None:
    for read in steps(sets, how, ranks, workers, state):
        channel.send(read)


def test_a_job_killed_again_and_again_reads_the_uninterrupted_sequence(sets, how, uninterrupted):
    """By SIGKILL, in the middle of loading; each time it resumes in another layout from the last state it saved."""
    rng = random.Random(7)
    fork = multiprocessing.get_context("fork")
    read: list[str] = []
    state = None
    for _ in range(12):
        receives, sends = fork.Pipe(duplex=False)
        layout = (rng.choice([1, 2, 4]), rng.choice([0, 1, 3]))
        job = fork.Process(target=load_until_killed, args=(sends, sets, how, *layout, state))
        job.start()
        sends.close()
        for _ in range(rng.randint(1, 4)):
            batch, state = receives.recv()
            read += batch
        os.kill(job.pid, signal.SIGKILL)
        job.join()
        assert job.exitcode == -signal.SIGKILL
    assert len(read) >= 12 * GBS
    assert read == uninterrupted[: len(read)]


# --- a state that is missing or another's ----------------------------------------------------------------------------


def refused(module: ShardedVLMDataModule, state: dict) -> str:
    with pytest.raises(ValueError, match="data.on_state_mismatch=restart begins the data anew") as caught:
        module.load_state_dict(state)
    return str(caught.value)


def test_a_state_that_does_not_fit_stops_the_run(sets, how):
    module = build(sets, how)
    module.trainer = SimpleNamespace(global_step=2)
    state = module.state_dict()
    assert "trained on other data" in refused(build(sets[::-1], how), state)
    assert "another blend" in refused(build(sets, how, weights=(3, 1, 1)), state)
    assert "trained on other data" in refused(build(sets[:2], how, weights=(3, 1)), state)
    assert "shuffle_seed=0" in refused(build(sets, how, shuffle_seed=1), state)
    assert "has no consumed_samples, shuffle_seed" in refused(build(sets, how), {"data": state["data"]})
    build(sets, how, weights=(6, 2, 4)).load_state_dict(state)  # the same proportions


def test_told_to_restart_a_run_begins_its_data_anew_and_says_so(sets, how, uninterrupted, caplog):
    module = build(sets, how, on_state_mismatch="restart")
    module.trainer = SimpleNamespace(global_step=5)
    module.load_state_dict({"consumed_samples": 40, "shuffle_seed": 0, "data": "other"})
    assert "the data begins anew at its first sample" in caplog.text
    read = [key for batch in islice(micro_batches(module, 0, 1), 8) for key in batch]
    assert read == uninterrupted[: 2 * GBS]
    module.trainer.global_step = 7
    assert module.state_dict()["consumed_samples"] == 2 * GBS
    with pytest.raises(ValueError, match="on_state_mismatch=ask"):
        build(sets, how, on_state_mismatch="ask")


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch):
        return (self.weight * len(batch)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, directory, max_steps, checkpoint=None):
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(Model(), module, ckpt_path=checkpoint)
    return trainer


def test_lightning_cannot_resume_without_the_state_of_the_data(sets, how, tmp_path, caplog):
    """It passes silently over a data module that the checkpoint does not name."""
    module = build(sets, how)
    trainer = fit(module, tmp_path, 3)
    whole, bare = tmp_path / "whole.ckpt", tmp_path / "bare.ckpt"
    trainer.save_checkpoint(whole)
    content = torch.load(whole, weights_only=False)
    assert content.pop("ShardedVLMDataModule")["consumed_samples"] == 3 * GBS
    torch.save(content, bare)

    resumed = build(sets, how)
    fit(resumed, tmp_path, 5, whole)
    assert resumed.consumed_samples == 5 * GBS
    with pytest.raises(ValueError, match="the checkpoint has no state of the data"):
        fit(build(sets, how), tmp_path, 5, bare)
    told = build(sets, how, on_state_mismatch="restart")
    fit(told, tmp_path, 5, bare)
    assert told.consumed_samples == 2 * GBS
    assert "the data begins anew" in caplog.text


def test_less_than_a_global_batch_is_an_error_that_says_how_much_is_missing(sets, how):
    manifests = [read_manifest(path) for path in sets]
    with pytest.raises(ValueError, match=r"a, .*b, .*c has 39 training samples but .*=64: prepare 25 more"):
        ShardedVLMDataModule(manifests[0], how, 120, 2, 64, blend=[(manifest, 1.0) for manifest in manifests])
    with pytest.raises(ValueError, match="a has 23 training samples but .*=32: prepare 9 more or lower it to 23"):
        ShardedVLMDataModule(manifests[0], how, 120, 2, 32)
