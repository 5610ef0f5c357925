"""The order in which samples are consumed, the same whatever the layout.

Training reads one endless stream: the samples in an order shuffled with (seed, epoch), epoch after epoch.
Global batch k is stream[k * GBS : (k + 1) * GBS]; it may span two epochs, and nothing is dropped. A position
in the stream is therefore all there is to resume from, and the number of data-parallel ranks does not enter.
Within a global batch, micro-batch m of data-parallel rank r is the slice at (m * DP + r) * MBS, as in Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass
class ShuffledStream:
    """``stream[position]`` is a sample number in [0, num_samples), for any position >= 0."""

    num_samples: int
    seed: int
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a batch spans two epochs at most at a time
                del self._orders[min(self._orders)]
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        return int(self._orders[epoch][offset])


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

    def __init__(self, stream: ShuffledStream, shape: BatchShape, consumed_samples: int):
        self.stream, self.shape, self.consumed_samples = stream, shape, consumed_samples

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed_samples
        while True:
            for positions in self.shape.micro_batches(start):
                yield [self.stream[position] for position in positions]
            start += self.shape.global_batch_size


class ValidationBatches:
    """The first samples of the split in order, in whole global batches, the same at every validation."""

    def __init__(self, num_samples: int, shape: BatchShape):
        self.shape = shape
        self.num_batches = num_samples // shape.global_batch_size
        if not self.num_batches:
            raise ValueError(
                f"{num_samples} validation samples are less than one global batch of {shape.global_batch_size}: "
                f"lower trainer.global_batch_size, or raise trainer.val_samples or prepare more data"
            )

    def __len__(self) -> int:
        """In micro-batches, as NeMo counts."""
        return self.num_batches * self.shape.num_microbatches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.num_batches):
            yield from map(list, self.shape.micro_batches(batch * self.shape.global_batch_size))
