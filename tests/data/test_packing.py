"""Packing loses no sample, overfills no row, and is the same however it is read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_pre.data.packing import PackedStream, Packing, pack
from nemo_pre.data.sampler import ShuffledStream

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200)


def test_a_case_by_hand():
    """Longest first: 7 | 6 | 4 beside 6 | 3 beside 7 | 2 in a row of its own, 10 being the capacity."""
    assert pack([4, 7, 2, 6, 3], 10) == [[1, 4], [0, 3], [2]]


@given(LENGTHS)
@settings(max_examples=300, deadline=None)
def test_every_index_lies_in_one_bin_that_holds_it(lengths):
    bins = pack(lengths, 64)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= 64 for members in bins)


@given(LENGTHS)
@settings(max_examples=300, deadline=None)
def test_no_two_bins_would_fit_into_one(lengths):
    """What best fit promises: a bin was only opened for what fitted nowhere."""
    full = sorted(sum(lengths[index] for index in members) for members in pack(lengths, 64))
    assert len(full) < 2 or full[0] + full[1] > 64


@given(
    lengths=st.lists(st.integers(1, 32), min_size=5, max_size=60),
    window=st.integers(1, 40),
    seed=st.integers(0, 5),
    rows=st.lists(st.integers(0, 150), min_size=1, max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_a_row_is_the_same_wherever_reading_starts(lengths, window, seed, rows):
    def stream() -> PackedStream:
        return PackedStream(ShuffledStream(len(lengths), seed), Packing(np.array(lengths), 32, window))

    read_through = stream()
    everything = [read_through[row] for row in range(max(rows) + 1)]
    assert [stream()[row] for row in rows] == [everything[row] for row in rows]


@given(st.lists(st.integers(1, 32), min_size=4, max_size=50), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_windows_take_the_stream_in_order_and_leave_nothing_out(lengths, window):
    samples = ShuffledStream(len(lengths), 3)
    stream = PackedStream(samples, Packing(np.array(lengths), 32, window))
    row, taken = 0, []
    for number in range(5):
        expected = [samples[position] for position in range(number * window, (number + 1) * window)]
        while len(taken) < len(expected):
            taken += stream[row]
            row += 1
        assert sorted(taken) == sorted(expected)
        taken = []


@pytest.mark.parametrize("lengths", [[3, 0], [3, 65]])
def test_a_length_that_fits_nowhere_is_refused(lengths):
    with pytest.raises(ValueError, match="not between 1 and 64"):
        pack(lengths, 64)


def test_efficiency_is_the_share_of_tokens():
    stream = PackedStream(ShuffledStream(4, 0), Packing(np.array([5, 5, 5, 5]), 10, 4))
    assert stream.efficiency(2) == 1.0
    assert PackedStream(ShuffledStream(4, 0), Packing(np.array([6, 6, 6, 6]), 10, 4)).efficiency(1) == 0.6
