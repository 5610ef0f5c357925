"""Logs of calls made by hand: those that meet, and those that do not, which are named."""

import pytest

from nemo_pre.rehearsal.calls import HOST, Call, Log
from nemo_pre.rehearsal.rendezvous import meet

BOTH, ALL = (0, 1), (0, 1, 2)


def log(*steps):
    """A log of calls; each ``(kind, ...)`` is made and waited for, but for those that ``later`` made."""
    made, numbers = Log(), {}
    for step in steps:
        if step == "sync":
            made.sync()
        elif isinstance(step, tuple):  # (name, call): made now, waited for where the name stands
            numbers[step[0]] = made.call(step[1])
        elif isinstance(step, str):
            made.wait(numbers[step])
        elif isinstance(step, list):
            for number in [made.call(call) for call in step]:
                made.wait(number)
        else:
            made.wait(made.call(step))
    return made


def collective(kind="all_reduce", size=8, ranks=BOTH, group="tensor", where="layer.py:1", device="cuda", peer=None):
    return Call(kind, group, ranks, size, "bfloat16", device, peer, where=where, phase="1")


def message(kind, peer, size=8, ranks=BOTH, batch=None, group="pipeline", where="stage.py:1", dtype="bfloat16"):
    return Call(kind, group, ranks, size, dtype, "cuda", peer, batch, where=where, phase="1")


def send(peer, **options):
    return message("send", peer, **options)


def recv(peer, **options):
    return message("recv", peer, **options)


def test_collectives_and_messages_that_meet_are_counted():
    forward = log(collective(), collective("all_gather", 4), send(1), recv(1, size=16))
    backward = log(collective(), collective("all_gather", 4), recv(0), send(0, size=16))
    met = meet({0: forward, 1: backward})
    assert (met.messages, met.collectives, met.problem) == (2, 2, None)


def test_ranks_that_are_not_simulated_come_when_they_are_expected():
    alone = log(collective(ranks=(0, 5)), send(7, ranks=(0, 7)), recv(7, ranks=(0, 7)))
    met = meet({0: alone})
    assert (met.messages, met.collectives, met.problem) == (0, 1, None)


def test_a_rank_that_skips_a_collective_is_named_with_the_line_that_waits_for_it():
    problem = meet({0: log(collective(), collective(where="head.py:7")), 1: log(collective())}).problem
    assert problem is not None and "rank 0 waits for rank 1 at all_reduce of 8 bytes" in problem
    assert "head.py:7" in problem and "rank 1 has come to its end" in problem


def test_a_rank_that_skips_one_of_two_kinds_is_named_by_what_comes_instead():
    problem = meet(
        {
            0: log(collective(), collective("all_gather", where="norm.py:3")),
            1: log(collective("all_gather", where="norm.py:3")),
        }
    ).problem
    assert (
        problem is not None and "Rank 1 comes with all_gather" in problem and "rank 0 comes with all_reduce" in problem
    )


def test_two_swapped_collectives_of_one_group_are_a_mismatch():
    first, second = collective("reduce_scatter", where="a.py:1"), collective("all_gather", where="b.py:2")
    problem = meet({0: log(first, second), 1: log(second, first)}).problem
    assert problem is not None and "a.py:1" in problem and "b.py:2" in problem


@pytest.mark.parametrize(
    "other", [dict(size=16), dict(device="cuda", kind="all_gather"), dict(kind="broadcast", peer=1)], ids=str
)
def test_a_collective_of_another_size_or_kind_is_a_mismatch(other):
    assert meet({0: log(collective()), 1: log(collective(**other))}).problem is not None


def test_two_swapped_collectives_of_two_groups_wait_for_each_other():
    one, two = collective(group="tensor"), collective(group="data")
    met = meet({0: log(one, two), 1: log(two, one)})
    assert met.collectives == 0
    assert (
        met.problem is not None
        and "rank 0 waits for rank 1" in met.problem
        and "rank 1 waits for rank 0" in met.problem
    )


def test_two_swapped_collectives_of_two_groups_meet_where_nobody_waits_between_them():
    one, two = collective(group="tensor"), collective(group="data")
    made = log(one, two)  # communicators are there
    first = log(one, two, ("x", one), ("y", two), "x", "y")
    second = log(one, two, ("y", two), ("x", one), "x", "y")
    assert made.calls and meet({0: first, 1: second}).problem is None


def test_the_first_collective_of_a_group_makes_its_communicator_and_hosts_wait_there():
    one, two = collective(group="tensor"), collective(group="data")
    first, second = log(("x", one), ("y", two), "x", "y"), log(("y", two), ("x", one), "x", "y")
    problem = meet({0: first, 1: second}).problem
    assert problem is not None and "its first" in problem


def test_both_ends_of_a_pair_stand_at_their_first_message():
    """A send of a pair without a communicator waits for its receiver, which here waits for something behind it."""
    sender = log(("m", send(1)), collective(), "m")
    receiver = log(collective(), recv(0))
    assert meet({0: sender, 1: receiver}).problem is not None
    before = log(send(1), ("m", send(1)), collective(), "m"), log(recv(0), collective(), recv(0))
    assert meet(dict(enumerate(before))).problem is None


def test_messages_of_a_pair_keep_their_order_and_those_that_cross_wait_for_each_other():
    crossed = {0: log(send(1), recv(1)), 1: log(send(0), recv(0))}
    assert meet(crossed).problem is not None
    batched = {0: log([send(1, batch=1), recv(1, batch=1)]), 1: log([send(0, batch=4), recv(0, batch=4)])}
    assert meet(batched).problem is None


def test_messages_of_different_sizes_are_a_mismatch():
    problem = meet({0: log(send(1, size=8, where="a.py:1")), 1: log(recv(0, size=16, where="b.py:2"))}).problem
    assert problem is not None and "8 bytes" in problem and "16 bytes" in problem and "a.py:1" in problem


def test_swapped_messages_of_equal_size_but_another_type_are_a_mismatch():
    problem = meet({0: log(send(1, dtype="float32", size=8)), 1: log(recv(0, size=8))}).problem
    assert problem is not None and "float32" in problem and "bfloat16" in problem


def test_a_message_that_nobody_receives_is_named():
    problem = meet({0: log(send(1), ("left", send(1, where="publish.py:9"))), 1: log(recv(0))}).problem
    assert problem is not None and "publish.py:9" in problem


def test_a_host_that_waits_for_its_device_does_not_run_ahead():
    """Rank 1's host makes the second group's communicator only after the first collective has ended."""
    one, two = collective(group="tensor"), collective(group="data")
    ahead = log(two, ("x", one), two, "x")
    other = log(two, ("x", one), "x", two)
    assert meet({0: ahead, 1: other}).problem is None
    new = collective(group="new")
    stands = log(("x", one), "x", "sync", new), log(("y", new), ("x", one), "y", "x")
    assert meet(dict(enumerate(stands))).problem is not None


def test_a_pipeline_of_three_in_which_one_stage_sends_before_it_receives():
    ranks = dict(ranks=ALL)
    right = {
        0: log(send(1, **ranks), recv(1, **ranks)),
        1: log(recv(0, **ranks), send(2, **ranks), recv(2, **ranks), send(0, **ranks)),
        2: log(recv(1, **ranks), send(1, **ranks)),
    }
    assert meet(right).problem is None
    wrong = {**right, 1: log(recv(0, **ranks), recv(2, **ranks), send(2, **ranks), send(0, **ranks))}
    problem = meet(wrong).problem
    assert problem is not None and "rank 1 waits for rank 2" in problem and "rank 2 waits for rank 1" in problem


def test_calls_of_hosts_block_them():
    objects = Call("all_gather_object", "objects of 0,1", BOTH, 0, "", HOST, phase="setup", where="setup.py:1")
    assert meet({0: log(objects, collective()), 1: log(objects, collective())}).problem is None
    problem = meet({0: log(objects, collective()), 1: log(collective(), objects)}).problem
    assert problem is not None and "waits" in problem
