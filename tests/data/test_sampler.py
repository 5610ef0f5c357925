"""The global order: the same samples in the same batches whatever the layout, also after a resume."""

from __future__ import annotations

from itertools import islice

import pytest

from nemo_pre.data.sampler import BatchShape, ShuffledStream, TrainingBatches


def _global_batches(
    dp: int, count: int, consumed: int = 0, mbs: int = 2, gbs: int = 8, n: int = 30
) -> list[list[int]]:
    """What all ranks together read, per optimizer step, in Megatron's order of micro-batches."""
    ranks = []
    for rank in range(dp):
        shape = BatchShape(mbs, gbs, rank, dp)
        batches = TrainingBatches(ShuffledStream(n, seed=5), shape, consumed)
        ranks.append(list(islice(batches, count * shape.num_microbatches)))
    per_step = len(ranks[0]) // count
    return [
        [
            sample
            for number in range(step * per_step, (step + 1) * per_step)
            for rank in range(dp)
            for sample in ranks[rank][number]
        ]
        for step in range(count)
    ]


def test_micro_batches_by_hand():
    shape = BatchShape(micro_batch_size=2, global_batch_size=8, data_parallel_rank=1, data_parallel_size=2)
    assert shape.num_microbatches == 2
    assert [list(positions) for positions in shape.micro_batches(100)] == [[102, 103], [106, 107]]


def test_a_global_batch_is_the_next_slice_of_the_stream_whatever_the_data_parallel_size():
    stream = ShuffledStream(30, seed=5)
    expected = [[stream[position] for position in range(k * 8, k * 8 + 8)] for k in range(12)]
    for dp in (1, 2, 4):
        assert _global_batches(dp, 12) == expected
    for mbs in (1, 4, 8):
        assert _global_batches(1, 12, mbs=mbs) == expected


def test_a_resume_at_another_layout_and_batch_size_replays_the_next_samples():
    whole = [sample for batch in _global_batches(1, 20) for sample in batch]
    for dp, mbs, gbs in ((1, 2, 8), (2, 2, 8), (4, 1, 8), (2, 3, 12)):
        resumed = _global_batches(dp, 5, consumed=24, mbs=mbs, gbs=gbs)
        assert [sample for batch in resumed for sample in batch] == whole[24 : 24 + 5 * gbs]


def test_each_epoch_is_another_permutation_of_all_samples():
    stream = ShuffledStream(30, seed=5)
    epochs = [[stream[epoch * 30 + i] for i in range(30)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [stream[i] for i in range(30)] == epochs[0], "going back gives the same order"
    assert [ShuffledStream(30, seed=6)[i] for i in range(30)] != epochs[0]


def test_a_batch_larger_than_the_dataset_still_takes_every_sample_in_turn():
    batch = next(iter(_global_batches(2, 1, gbs=16, n=5)))
    assert sorted(batch[:5]) == sorted(batch[5:10]) == sorted(batch[10:15]) == list(range(5))


def test_a_layout_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="global_batch_size=8 must be a multiple"):
        BatchShape(3, 8, 0, 1)
