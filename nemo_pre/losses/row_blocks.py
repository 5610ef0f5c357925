"""Rows of a matrix, some at a time, so that what a loss computes in float32 is never as large as its inputs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # of a block: 64 MB in float32


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Consecutive slices of the rows of ``[n, d]``, each of at most ``BLOCK_ELEMENTS`` elements, one row at least."""
    step = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)
