"""Several gloo ranks inside one test: start them, read their results, and put their shards together."""

from tests.ranks.launch import RankError, run_ranks

__all__ = ["RankError", "run_ranks"]
