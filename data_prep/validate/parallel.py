"""Work spread over processes, with results as they come and few of them in memory."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nemo_pre.orphans import end_with_the_pool

Job = TypeVar("Job")
Result = TypeVar("Result")
WAITING_PER_WORKER = 4


def num_workers(workers: int | None) -> int:
    """The number of workers, by default one for every CPU core. Raises ValueError below 1."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: give at least 1")
    return workers or len(os.sched_getaffinity(0))


def in_parallel(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """``function`` of every job, in any order; in this process where there is only one worker or one job.

    Raises:
        ValueError: a process died.
    """
    if workers == 1 or len(jobs) <= 1:
        yield from map(function, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), spawn, initializer=end_with_the_pool) as pool:
        waiting: set[Future[Result]] = set()
        try:
            for job in jobs:
                waiting.add(pool.submit(function, job))
                if len(waiting) >= WAITING_PER_WORKER * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise ValueError("a worker process died, perhaps for want of memory: lower workers") from error
