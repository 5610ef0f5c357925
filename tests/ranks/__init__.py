"""Several gloo ranks inside one test: start them, read their results, and put their shards together.

- ``run_ranks(fn, world_size, *args)``: new processes for this one call.
- ``run_on_standing_ranks(fn, world_size, *args)``: the same on processes that stay for the next call, which forget the
  job in between. Several times cheaper.
- ``Ranks(world_size)``: such processes to keep oneself, with ``run(fn, *args)`` and ``close()``.
"""

from tests.ranks.launch import RankError, Ranks, run_ranks
from tests.ranks.standing import close_standing_ranks, run_on_standing_ranks

__all__ = ["RankError", "Ranks", "close_standing_ranks", "run_on_standing_ranks", "run_ranks"]
