"""Questions that appear in more than one split, found by sorting digests: 24 bytes of memory each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_prep.validate.content import DIGEST_BYTES, ChunkResult

Place = tuple[int, int]  # number of the shard, position in it


class Questions:
    """Digests of the questions of all the shards; ``split_of_shard`` gives the number of a shard's split."""

    def __init__(self, split_of_shard: list[int]):
        self.splits = np.array(split_of_shard, np.int32)
        self.digests: list[np.ndarray] = []
        self.places: list[np.ndarray] = []

    def add(self, result: ChunkResult) -> None:
        self.digests.append(np.frombuffer(bytes(result.digests), np.uint64).reshape(-1, DIGEST_BYTES // 8))
        places = np.empty((len(result.positions), 2), np.int32)
        places[:, 0], places[:, 1] = result.shard_number, result.positions
        self.places.append(places)

    def across_splits(self) -> Iterator[tuple[Place, Place]]:
        """(sample, sample of an earlier split with the same question about the same image)."""
        if not self.digests:
            return
        digests, places = np.concatenate(self.digests), np.concatenate(self.places)
        self.digests, self.places = [], []
        splits = self.splits[places[:, 0]]
        order = np.lexsort((places[:, 1], places[:, 0], splits, digests[:, 1], digests[:, 0]))
        digests, places, splits = digests[order], places[order], splits[order]
        begins = np.ones(len(digests), bool)
        begins[1:] = (digests[1:] != digests[:-1]).any(axis=1)
        first = np.flatnonzero(begins)[np.cumsum(begins) - 1]  # of those with the same digest
        for here in np.flatnonzero(splits != splits[first]):
            yield (int(places[here, 0]), int(places[here, 1])), tuple(places[first[here]].tolist())
