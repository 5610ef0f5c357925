"""Pairs of stages have met before the schedule starts: NCCL would have both wait for their first message."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nemo_pre.parallel.anchor_exchange import AnchorExchange
from tests.ranks import run_ranks


def met_stages(readers: list[int]) -> list[tuple[str, int]]:
    """On a stage: connect, then carry an anchor; the messages in their order, and to or from which stage."""
    dist.init_process_group("gloo")
    seen: list[tuple[str, int]] = []

    def noted(name: str) -> None:
        original = getattr(dist, name)

        def call(*args, **kwargs):
            seen.append((name, kwargs.get("group_dst", kwargs.get("group_src"))))
            return original(*args, **kwargs)

        setattr(dist, name, call)

    for name in ("send", "recv", "isend", "irecv"):
        noted(name)
    stage, anchor = dist.get_rank(), torch.arange(6.0).view(3, 2)
    exchange = AnchorExchange(dist.group.WORLD, stage, readers)
    exchange.connect(torch.device("cpu"))
    if stage == 0:
        exchange.publish(0, anchor)
    if readers[stage]:
        exchange.expect(0, (3, 2), torch.float32, torch.device("cpu"))
        assert all(torch.equal(exchange.take(0), anchor) for _ in range(readers[stage]))
    exchange.finish_step()
    return seen


def test_every_pair_has_exchanged_a_message_before_the_first_anchor():
    first, idle, reader, last = run_ranks(met_stages, 4, [1, 0, 2, 1])
    assert first == [("send", 2), ("send", 3), ("isend", 2), ("isend", 3)]
    assert idle == []
    assert reader == last == [("recv", 0), ("irecv", 0)]
