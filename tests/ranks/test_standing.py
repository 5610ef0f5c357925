"""Ranks that stay: a job cannot tell whether others ran before it, and a failure is one job's."""

from __future__ import annotations

import os
import time

import pytest

from tests.ranks import RankError, Ranks, run_on_standing_ranks
from tests.ranks.test_launch import die_on, fail_on, wait_for_nobody


def process():
    return os.getpid()


def print_and_fail(words):
    print(words)
    raise ArithmeticError("wrong sign on purpose")


def meet_and_leave_traces():
    """Initialise torch's and Megatron's groups as the first job of a process would; leave everything behind."""
    import random

    import numpy as np
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from nemo.utils.app_state import AppState

    from nemo_pre.compat import cpu_backend

    cpu_backend.apply()
    state = AppState()
    found = (
        random.random(),
        np.random.rand(),  # noqa: NPY002 - what NeMo seeds
        torch.rand(1).item(),
        os.environ.get("TRACE"),
        getattr(state, "_trace", None),
    )
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(7)
    total = torch.ones(1)
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    os.environ["TRACE"] = "left by a job"
    state._trace = "left by a job"
    return found, total.item()


def test_jobs_of_one_size_share_their_ranks_and_another_size_gets_others():
    first, second, third = (run_on_standing_ranks(process, size) for size in (2, 2, 1))
    assert first == second and len(set(first)) == 2
    assert not set(third) & set(first)


def test_a_job_finds_no_groups_variables_or_drawn_numbers_of_the_former():
    with Ranks(2) as ranks:
        first, second, third = (ranks.run(meet_and_leave_traces) for _ in range(3))
    assert first == second == third
    assert first[0] == (first[0][0], 2.0) and first[0][0][3:] == (None, None)


@pytest.mark.parametrize(
    "job, timeout, sentence",
    [
        (fail_on, 60, r"(?s)rank 0 of 2.*in fail_on.*ArithmeticError: wrong sign on purpose"),
        (die_on, 60, r"(?s)rank 0 of 2: exited with code 7.*last words"),
        (wait_for_nobody, 3, r"(?s)rank 0 of 2: still running after 3 s.*in wait_for_nobody.*rank 1 of 2"),
    ],
)
def test_a_failure_is_one_jobs_and_the_next_has_other_ranks(job, timeout, sentence):
    before = run_on_standing_ranks(process, 2)
    start = time.monotonic()
    with pytest.raises(RankError, match=sentence):
        run_on_standing_ranks(job, 2, *([0] if job is not wait_for_nobody else []), timeout=timeout)
    assert time.monotonic() - start < 30
    assert not set(run_on_standing_ranks(process, 2)) & set(before)


def test_a_rank_that_died_between_two_jobs_fails_the_next_one():
    ranks = Ranks(1)
    (pid,) = ranks.run(process)
    os.kill(pid, 9)
    with pytest.raises(RankError, match="rank 0 of 1: exited with code -9 and without a result"):
        ranks.run(process)
    assert not ranks.alive


def test_the_output_that_an_error_shows_is_its_own_jobs():
    with Ranks(1) as ranks:
        ranks.run(print, "words of the former job")
        with pytest.raises(RankError, match="words of the last job") as error:
            ranks.run(print_and_fail, "words of the last job")
    assert "words of the former job" not in str(error.value)
