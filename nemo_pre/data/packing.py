"""Which samples share a sequence: best-fit packing of a window of the stream at a time.

The rows are a function of the stream and of the lengths of samples alone, so the number of a row is all there is to
resume from, whatever the layout. Rows of a window are shuffled, or the ones with the longest
samples would come first.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class SampleStream(Protocol):
    """``stream[position]`` is a sample number, for any position >= 0."""

    seed: int

    def __getitem__(self, position: int) -> int: ...


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of at most ``capacity``: longest first, each into the fullest bin it fits in.

    Best-fit decreasing needs at most 11/9 of the optimal number of bins and one more (Johnson, 1974). A bin's indices
    are in ascending order.

    Raises:
        ValueError: a length is not between 1 and the capacity.
    """
    if any(not 1 <= length <= capacity for length in lengths):
        raise ValueError(f"A length is not between 1 and {capacity}: {min(lengths)} to {max(lengths)} were given.")
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            left, number = capacity, len(bins)
            bins.append([])
        else:
            left, number = room.pop(place)
        bins[number].append(index)
        bisect.insort(room, (left - lengths[index], number))
    return [sorted(members) for members in bins]


@dataclass(frozen=True)
class Packing:
    """What rows are planned from.

    Attributes:
        lengths: tokens of every sample, images expanded, at most ``capacity``.
        capacity: tokens of a row.
        window: samples that are packed at a time.
    """

    lengths: np.ndarray
    capacity: int
    window: int

    @property
    def fingerprint(self) -> str:
        """Changes with the rows."""
        digest = hashlib.sha256(self.lengths.astype(np.int32).tobytes())
        digest.update(f"{self.capacity} {self.window}".encode())
        return digest.hexdigest()[:16]


@dataclass
class PackedStream:
    """``stream[row]`` is the tuple of sample numbers that share row ``row``, for any row >= 0.

    ``samples`` is their order, without packing.
    """

    samples: SampleStream
    packing: Packing
    _ends: list[int] = field(default_factory=list, repr=False)  # of every window packed so far, in rows
    _latest: dict[int, list[tuple[int, ...]]] = field(default_factory=dict, repr=False)

    def __getitem__(self, row: int) -> tuple[int, ...]:
        while not self._ends or self._ends[-1] <= row:
            number = len(self._ends)
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._rows(number)))
        number = bisect.bisect_right(self._ends, row)
        return self._rows(number)[row - (self._ends[number - 1] if number else 0)]

    def _rows(self, number: int) -> list[tuple[int, ...]]:
        if number not in self._latest:
            while len(self._latest) > 1:  # a batch spans two windows at most at a time
                del self._latest[min(self._latest)]
            first = number * self.packing.window
            members = [self.samples[position] for position in range(first, first + self.packing.window)]
            bins = pack([int(self.packing.lengths[member]) for member in members], self.packing.capacity)
            order = np.random.default_rng([self.samples.seed, number, 1]).permutation(len(bins))
            self._latest[number] = [tuple(members[index] for index in bins[bin_]) for bin_ in order]
        return self._latest[number]

    def efficiency(self, windows: int = 8) -> float:
        """Share of a row's tokens that are a sample's, over the first windows."""
        rows = [row for number in range(windows) for row in self._rows(number)]
        tokens = sum(int(self.packing.lengths[member]) for row in rows for member in row)
        return tokens / (len(rows) * self.packing.capacity)
