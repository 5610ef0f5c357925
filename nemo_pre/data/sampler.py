"""The order in which samples are consumed, the same whatever the layout.

Training reads one endless stream. Each of its sources, prepared sets with weights, is shuffled with (seed, epoch,
number of the source), epoch after epoch, and the sources alternate in a fixed pattern that repeats; so the sample at
a position follows from seed and position alone. Global batch k is stream[k * GBS : (k + 1) * GBS]; it may span two
epochs, and nothing is dropped. A position in the stream is therefore all there is to resume from, and the number of
data-parallel ranks or loader processes does not enter.
Within a global batch, micro-batch m of data-parallel rank r is the slice at (m * DP + r) * MBS, as in Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm
from typing import Any, Protocol

import numpy as np

PACKED = ", packed "  # between the fingerprint of samples and that of the rows they are packed into
MAX_PERIOD = 1 << 20  # positions after which a blend's pattern repeats; weights are rounded to one in so many


class Stream(Protocol):
    def __getitem__(self, position: int) -> Any:
        """A sample's number, or those of a row of samples, for any position >= 0."""


@dataclass
class ShuffledStream:
    """``stream[position]`` is a sample number in [0, num_samples), for any position >= 0."""

    num_samples: int
    seed: int
    source: int = 0
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a batch spans two epochs at most at a time
                del self._orders[min(self._orders)]
            order = np.random.default_rng([self.seed, epoch, self.source]).permutation(self.num_samples)
            self._orders[epoch] = order
        return int(self._orders[epoch][offset])


class BlendedStream:
    """Sources of ``sizes`` samples, numbered one after another, drawn in proportion to ``weights``.

    In every period, which starts at position 0, each source has exactly its share; at any position it is at most
    1/2 + (its weight's share) * (number of sources) / 2 samples from it.

    Attributes:
        shares: positions of each source in a period.

    Raises:
        ValueError: a weight is not positive, or rounds to nothing.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        self.seed, self.shares = seed, shares(weights)
        # The j-th of a source's n positions in a period should lie at (j + 1/2) / n of it.
        number = np.repeat(np.arange(len(self.shares)), self.shares)
        occurrence = np.concatenate([np.arange(share) for share in self.shares])
        order = np.lexsort((number, (2 * occurrence + 1) / np.asarray(self.shares)[number]))
        self._source, self._occurrence = number[order], occurrence[order]
        self._starts = np.cumsum([0, *sizes])
        self._streams = [ShuffledStream(size, seed, source) for source, size in enumerate(sizes)]

    def __getitem__(self, position: int) -> int:
        period, place = divmod(position, len(self._source))
        source = int(self._source[place])
        drawn = period * self.shares[source] + int(self._occurrence[place])
        return int(self._starts[source]) + self._streams[source][drawn]


class SkippingStream:
    """A stream without ranges of its positions: what lies behind one moves up.

    So a position still counts the samples trained on, and those before a range stay where they were.

    Args:
        stream: the whole one.
        skipped: ranges [first, end) of its positions.
    """

    def __init__(self, stream: Stream, skipped: Sequence[tuple[int, int]]):
        self.stream, self.skipped = stream, skipped

    def __getitem__(self, position: int) -> Any:
        return self.stream[whole_position(position, self.skipped)]


def whole_position(position: int, skipped: Sequence[tuple[int, int]]) -> int:
    """The position in the whole stream of what lies at ``position`` when the ranges ``skipped`` are left out."""
    end_of_former = 0
    for first, end in sorted(skipped):
        if first > position:
            break
        position += max(0, end - max(first, end_of_former))  # ranges may overlap
        end_of_former = max(end, end_of_former)
    return position


def shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of ``weights``: exact where they add up to no more than a period."""
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"data.blend has the weights {list(weights)}: give every source one above 0")
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth, not the float beside it
    fractions = [weight / sum(exact) for weight in exact]
    period = min(lcm(*(fraction.denominator for fraction in fractions)), MAX_PERIOD)
    rounded = [int(fraction * period) for fraction in fractions]
    largest_remainders = sorted(range(len(rounded)), key=lambda i: (rounded[i] - fractions[i] * period, i))
    for source in largest_remainders[: period - sum(rounded)]:
        rounded[source] += 1
    if min(rounded) == 0:
        raise ValueError(f"data.blend has the weights {list(weights)}: none may be less than a millionth of all")
    return rounded


def samples_fingerprint(fingerprints: Sequence[str], weights: Sequence[float]) -> str:
    """What changes with the training samples of any source, by their manifests, and with the proportions of a blend.

    Raises:
        ValueError: a weight is not positive, or rounds to nothing.
    """
    if len(fingerprints) == 1:
        return fingerprints[0]
    return " + ".join(f"{share} x {each}" for share, each in zip(shares(weights), fingerprints, strict=True))


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut into the micro-batches of each data-parallel rank."""

    micro_batch_size: int
    global_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def __post_init__(self) -> None:
        samples_per_pass = self.micro_batch_size * self.data_parallel_size
        if self.global_batch_size % samples_per_pass:
            raise ValueError(
                f"trainer.global_batch_size={self.global_batch_size} must be a multiple of "
                f"trainer.micro_batch_size={self.micro_batch_size} times {self.data_parallel_size} data-parallel ranks"
            )

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def micro_batches(self, start: int) -> Iterator[range]:
        """This rank's positions, micro-batch by micro-batch, of the global batch that begins at ``start``."""
        for number in range(self.num_microbatches):
            first = start + (number * self.data_parallel_size + self.data_parallel_rank) * self.micro_batch_size
            yield range(first, first + self.micro_batch_size)


class TrainingBatches:
    """Endless micro-batches of sample numbers from position ``consumed_samples`` of the stream on.

    It has no length on purpose: the run ends by ``max_steps``, and what Lightning calls an epoch never ends,
    so no epoch boundary of Lightning's can fall into the middle of a global batch.
    """

    def __init__(self, stream: Stream, shape: BatchShape, consumed_samples: int):
        self.stream, self.shape, self.consumed_samples = stream, shape, consumed_samples

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed_samples
        while True:
            for positions in self.shape.micro_batches(start):
                yield [self.stream[position] for position in positions]
            start += self.shape.global_batch_size
