"""Several jobs in one start of the ranks: starting them takes longer than a tiny model's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.ranks import run_ranks

Job = tuple[Callable[..., Any], tuple[Any, ...]]  # a function of a *_ranks module and its arguments


def run_jobs(jobs: dict[str, Job], ranks: int) -> dict[str, list[Any]]:
    """What each job returned on every rank, by the job's name; each starts a layout of its own on the same ranks.

    Raises:
        RankError: a job raised; the message names it.
    """
    of_ranks = run_ranks(_one_after_another, ranks, jobs, timeout=60.0 + 60.0 * len(jobs))
    return {name: [results[name] for results in of_ranks] for name in jobs}


def _one_after_another(jobs: dict[str, Job]) -> dict[str, Any]:
    from tests.compat import tiny_gpt

    results = {}
    for name, (function, arguments) in jobs.items():
        try:
            results[name] = function(*arguments)
        except Exception as error:
            raise RuntimeError(f"job {name} failed") from error
        tiny_gpt.stop()
    return results
