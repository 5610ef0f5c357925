"""Several prepared sets in one stream: in proportion at every moment, each shuffled by itself, a function of the
position alone."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest

from nemo_pre.checks.run import check_options, check_run
from nemo_pre.config.compose import compose_run
from nemo_pre.data.dataset import ConversationDataset
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.sampler import BatchShape, BlendedStream, ShuffledStream, TrainingBatches, shares
from tests.data.prepared_sets import preprocessing, sample, text_set, write_set


def random_blend(rng: random.Random) -> tuple[list[int], list[float]]:
    sources = rng.randint(1, 6)
    sizes = [rng.randint(1, 60) for _ in range(sources)]
    return sizes, [rng.choice([rng.randint(1, 9), round(rng.uniform(0.01, 3), 2)]) for _ in sizes]


def source_of(sample_number: int, sizes: list[int]) -> int:
    return int(np.searchsorted(np.cumsum(sizes), sample_number, side="right"))


def test_every_source_has_its_share_of_every_beginning_of_the_stream():
    for seed in range(60):
        sizes, weights = random_blend(random.Random(seed))
        stream = BlendedStream(sizes, weights, seed)
        fractions = np.asarray(weights) / sum(weights)
        drawn = np.zeros(len(sizes))
        for position in range(800):
            drawn[source_of(stream[position], sizes)] += 1
            bound = 0.5 + fractions * len(sizes) / 2 + 1e-3
            assert (abs(drawn - fractions * (position + 1)) <= bound).all(), (seed, position)


def test_the_proportions_are_exact_where_the_weights_are_whole_numbers_or_decimals():
    assert shares([2, 1]) == [2, 1]
    assert shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert shares([558128, 665298]) == [279064, 332649]
    assert shares([3.0]) == [1]
    stream = BlendedStream([5, 500], [0.7, 0.3], seed=1)
    for start in (0, 10, 970):
        assert sum(stream[position] < 5 for position in range(start, start + 10)) == 7
    thirds = shares([1 / 3] * 3)
    assert max(thirds) - min(thirds) <= 1
    for wrong in ([1, 0], [1, -2], [1, 1e-9]):
        with pytest.raises(ValueError, match="data.blend has the weights"):
            shares(wrong)


def test_each_source_is_shuffled_by_itself_epoch_after_epoch():
    for seed in range(30):
        sizes, weights = random_blend(random.Random(seed))
        stream = BlendedStream(sizes, weights, seed)
        read = [stream[position] for position in range(600)]
        starts = np.cumsum([0, *sizes])
        for source, size in enumerate(sizes):
            own = [number - starts[source] for number in read if source_of(number, sizes) == source]
            alone = ShuffledStream(size, seed, source)
            assert own == [alone[position] for position in range(len(own))]
            for epoch in range(len(own) // size):
                assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_sources_of_one_size_are_shuffled_differently():
    stream = BlendedStream([40, 40], [1, 1], seed=2)
    read = [stream[position] for position in range(80)]
    assert [number for number in read if number < 40] != [number - 40 for number in read if number >= 40]


def test_one_source_is_read_in_the_order_it_always_was():
    stream = BlendedStream([30], [5.0], seed=3)
    for epoch in range(3):
        order = np.random.default_rng([3, epoch]).permutation(30)
        assert [stream[epoch * 30 + offset] for offset in range(30)] == order.tolist()


def test_any_interruption_and_any_layout_leave_the_stream_as_it_was():
    """Resumed anywhere, at another micro-batch, global batch and data-parallel size, time after time."""
    for seed in range(40):
        rng = random.Random(seed)
        sizes, weights = random_blend(rng)
        expected = BlendedStream(sizes, weights, seed)
        consumed = 0
        for _ in range(5):
            dp, mbs, passes = rng.choice([1, 2, 4]), rng.randint(1, 3), rng.randint(1, 3)
            gbs, steps = dp * mbs * passes, rng.randint(1, 6)
            ranks = []
            for rank in range(dp):
                batches = TrainingBatches(
                    BlendedStream(sizes, weights, seed), BatchShape(mbs, gbs, rank, dp), consumed
                )
                ranks.append(list(islice(batches, steps * passes)))
            read = [number for micro_batches in zip(*ranks, strict=True) for rows in micro_batches for number in rows]
            assert read == [expected[consumed + offset] for offset in range(steps * gbs)]
            consumed += steps * gbs


def test_a_skipped_sample_is_replaced_by_one_of_its_own_set(tmp_path):
    first = text_set(tmp_path, "first", 3)
    second = write_set(tmp_path / "second", [sample("a"), ("b", {"json": b"{"}), ("c", {"json": b"["})])
    manifests = [read_manifest(first), read_manifest(second)]
    read = ConversationDataset(manifests, "train", preprocessing(), on_error="skip")
    assert read.sizes == [3, 3]
    assert [read[number].key for number in range(6)] == ["first-0", "first-1", "first-2", "a", "a", "a"]
    with pytest.raises(IndexError):
        read[6]


def test_a_blend_is_set_on_the_command_line_and_checked_without_a_model(digits, tmp_path):
    def run(blend: str, *more: str):
        return compose_run(["experiment=digits_tiny", f"data.path={digits}", f"data.blend={blend}", *more])

    other = text_set(tmp_path, "other", 6)
    config = run(f"[{{path:{digits},weight:2}},{{path:{other},weight:0.5}}]")
    assert [(source.path, source.weight) for source in config.data.blend] == [(str(digits), 2.0), (str(other), 0.5)]
    check_run(config)
    with pytest.raises(ValueError, match="nothing has no manifest.json"):
        check_run(run(f"[{{path:{tmp_path}/nothing}}]"))
    with pytest.raises(ValueError, match="other has 6 training samples but .*global_batch_size=8: prepare 2 more"):
        check_run(run(f"[{{path:{other}}}]", "trainer.global_batch_size=8", "trainer.micro_batch_size=1"))
    with pytest.raises(ValueError, match=r"data.blend\[0\].weight=0.0 must be more than 0"):
        check_options(run(f"[{{path:{other},weight:0}}]"))


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["data.image_resize=squeeze"], "data.image_resize=squeeze is unknown: choose one of whole, crop, pad"),
        (["data.image_filter=box"], "data.image_filter=box is unknown"),
        (["data.on_state_mismatch=ask"], "data.on_state_mismatch=ask is unknown: choose one of raise, restart"),
        (["data.max_tiles=0"], "data.max_tiles=0 must be 1 or more"),
        (["data.max_tiles=2"], "data.max_tiles=2 is a thumbnail and a grid of one cell"),
        (["data.max_tiles=5"], "data.max_tiles=5 cannot be validated by generation"),
    ],
)
def test_options_of_the_data_that_cannot_be_are_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_options(compose_run(["experiment=digits_tiny", *overrides]))
