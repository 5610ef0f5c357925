"""Ranks that stay for the next job, since starting them takes longer than most jobs do.

One group stands at a time in a process of the tests: a job for another number of ranks, or a failure, ends it and
starts another. So tests that ask for equally many ranks should follow each other: :mod:`tests.ranks.scheduling`.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any

from tests.ranks.launch import Ranks

_standing: Ranks | None = None


def run_on_standing_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """:func:`tests.ranks.run_ranks`, on the ranks of the former call if it asked for equally many.

    For jobs whose traces :mod:`tests.ranks.reset` knows: Megatron's and NeMo's state, process groups, environment,
    random numbers. A job that changes anything else, such as an attribute of a module, must put it back itself.
    """
    global _standing
    if _standing is None or not _standing.alive or len(_standing) != world_size:
        close_standing_ranks()
        _standing = Ranks(world_size)
    return _standing.run(fn, *args, timeout=timeout)


@atexit.register  # before multiprocessing waits for its children to end by themselves
def close_standing_ranks() -> None:
    global _standing
    if _standing is not None:
        _standing.close()
        _standing = None
