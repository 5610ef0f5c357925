"""The data module on real data-parallel ranks: what the job reads, saves and resumes."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest

from tests.data.prepared import digits_config
from tests.ranks import RankError, run_on_standing_ranks


def read_steps(path: str, steps: int, state: dict | None, workers: int = 0) -> tuple[list, dict, int]:
    """Runs on a rank: the tokens of each micro-batch of ``steps`` optimizer steps, and the state after them."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from nemo_pre.nemo.data import build_data_module
    from nemo_pre.orphans import end_with_the_loader

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    module = build_data_module(digits_config(path, num_workers=workers))
    first_step = 0 if state is None else state.pop("global_step")
    module.trainer = SimpleNamespace(global_step=first_step)
    if state is not None:
        module.load_state_dict(state)
    loader = module.data_sampler.transform_dataloader(module.train_dataloader())
    num_microbatches = 16 // (2 * dist.get_world_size())
    read = []
    assert loader.worker_init_fn is end_with_the_loader  # also where NeMo has made another loader of ours
    batches = iter(loader)
    for _ in range(steps):
        read += [batch["tokens"].tolist() for batch in islice(batches, num_microbatches)]
        module.trainer.global_step += 1
    return read, {**module.state_dict(), "global_step": module.trainer.global_step}, module.consumed_samples


def _in_order(ranks: list[list]) -> list:
    """The ranks' micro-batches in the order of the global stream, as one list of samples."""
    return [sample for micro_batches in zip(*ranks, strict=True) for batch in micro_batches for sample in batch]


def test_two_ranks_read_what_one_reads_and_either_resumes_the_other(digits):
    path = str(digits)
    ((one, _, consumed),) = run_on_standing_ranks(read_steps, 1, path, 24, None, timeout=300)
    assert consumed == 24 * 16 > 320, "the run goes beyond one epoch"
    whole = _in_order([one])

    on_two = run_on_standing_ranks(read_steps, 2, path, 10, None, timeout=300)
    assert _in_order([read for read, _, _ in on_two]) == whole[: 10 * 16]
    state = on_two[0][1]
    assert state == on_two[1][1]
    assert state["consumed_samples"] == 160

    ((resumed, state, _),) = run_on_standing_ranks(read_steps, 1, path, 3, state, timeout=300)
    assert _in_order([resumed]) == whole[160 : 160 + 48]
    assert state["consumed_samples"] == 208

    again_on_two = run_on_standing_ranks(read_steps, 2, path, 11, state, 1, timeout=300)
    assert _in_order([read for read, _, _ in again_on_two]) == whole[208:]


def test_a_checkpoint_of_other_data_or_another_order_is_refused(digits):
    state = {"consumed_samples": 16, "shuffle_seed": 0, "data": "other", "global_step": 1}
    with pytest.raises(RankError, match="trained on other data"):
        run_on_standing_ranks(read_steps, 1, str(digits), 1, state)
    from nemo_pre.data.manifest import read_manifest

    state = {**state, "data": read_manifest(digits).fingerprint, "shuffle_seed": 7}
    with pytest.raises(RankError, match="shuffle_seed=7"):
        run_on_standing_ranks(read_steps, 1, str(digits), 1, state)
