"""Progress of moving weights, in megabytes."""

from __future__ import annotations

from collections.abc import Callable

MEGABYTE = 1_000_000


def bytes_progress(what: str, total: int) -> Callable[[int], None]:
    """A function to be called with the bytes that were moved; it prints rate and remaining time."""
    from nemo_pre.data.progress import Progress

    progress = Progress(f"{what}, MB", -(-total // MEGABYTE))
    moved = 0

    def advance(size: int) -> None:
        nonlocal moved
        before, moved = moved, moved + size
        finished = moved >= total
        progress.advance((progress.total if finished else moved // MEGABYTE) - before // MEGABYTE)

    return advance
