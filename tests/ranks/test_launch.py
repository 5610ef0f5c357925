"""The harness: results by rank, and every way a rank can fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.ranks import RankError, run_ranks


def say_rank(greeting):
    print("not the test's output")
    return greeting, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def sum_of_ranks():
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return total, torch.get_num_threads(), "nemo.collections.vlm" in sys.modules


def fail_on(rank):
    if int(os.environ["RANK"]) == rank:
        raise ArithmeticError("wrong sign on purpose")
    time.sleep(60)


def die_on(rank):
    if int(os.environ["RANK"]) == rank:
        print("last words", flush=True)
        os._exit(7)
    time.sleep(60)


def wait_for_nobody():
    time.sleep(60)


def start_a_child():
    import subprocess

    return subprocess.Popen(["sleep", "60"]).pid


def test_each_rank_returns_its_value_in_order(capfd):
    assert run_ranks(say_rank, 3, "hi") == [("hi", 0, 3), ("hi", 1, 3), ("hi", 2, 3)]
    assert "not the test's output" not in capfd.readouterr().out


def test_ranks_form_a_gloo_group_and_have_nemo_already():
    first, second = run_ranks(sum_of_ranks, 2)
    assert first == second
    assert first[0] == 1
    assert first[1:] == (1, True)


def test_the_process_that_starts_ranks_does_not_import_nemo():
    """In a fresh process, for other tests may have imported it into this one."""
    program = (
        "import sys; from tests.ranks import run_ranks; from tests.ranks.test_launch import say_rank\n"
        "if __name__ == '__main__': run_ranks(say_rank, 1, 'hi'); assert 'nemo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_ranks_exception_is_raised_here_with_its_traceback_and_ends_the_others():
    run_ranks(say_rank, 1, "warm")
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*in fail_on.*ArithmeticError: wrong sign on purpose"):
        run_ranks(fail_on, 2, 1)
    assert time.monotonic() - start < 20


def test_a_rank_that_dies_is_named_with_its_last_words():
    with pytest.raises(RankError, match=r"(?s)rank 0 of 2: exited with code 7.*last words"):
        run_ranks(die_on, 2, 0)


def test_a_hang_ends_at_the_timeout_and_says_where():
    run_ranks(say_rank, 1, "warm")
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 0 of 2: still running after 3 s.*in wait_for_nobody.*rank 1 of 2"):
        run_ranks(wait_for_nobody, 2, timeout=3)
    assert time.monotonic() - start < 20


def test_what_a_rank_started_ends_with_it():
    [child] = run_ranks(start_a_child, 1)
    for _ in range(50):
        try:
            state = open(f"/proc/{child}/stat").read().split(")")[1].split()[0]  # noqa: SIM115
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} is still running")
