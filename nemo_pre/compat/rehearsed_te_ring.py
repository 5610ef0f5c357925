"""Transformer Engine 2.9.0's attention over context ranks, each of which sends keys and values to the next.

Files and lines are of ``transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py`` 2.9.0, of
``AttnFuncWithCPAndKVP2P``: causal, by cuDNN, in bf16, of tensors ``[Q, B, heads, D]`` whose first half is from the
sequence's beginning and whose second from its end. A rank of N attends N times: to its own keys; to the first half of
those of the ranks before it; with the second half of its queries to those of the ranks behind it (:1444).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.compat.rehearsed_kernels import pairs_of

IN_A_BATCH = 2  # ranks up to which a device before Blackwell sends and receives in one call (:1125)


@dataclass(frozen=True)
class Ring:
    """The context ranks of an attention.

    Attributes:
        group: theirs. ``ranks``: their global ranks. ``rank``: this one's place among them.
    """

    group: Any
    ranks: Sequence[int]
    rank: int

    @property
    def size(self) -> int:
        return len(self.ranks)

    def exchange(self, sent: Tensor, received: Tensor, ahead: int) -> list[Any]:
        """Send to the rank ``ahead`` and receive from the one behind; what is to be waited for (:59).

        Even ranks send first, odd ones receive first.
        """
        to, of = (self.ranks[(self.rank + step) % self.size] for step in (ahead, -ahead))
        calls = [(dist.isend, sent, to), (dist.irecv, received, of)]
        if self.rank % 2:
            calls.reverse()
        if self.size <= IN_A_BATCH:
            return dist.batch_isend_irecv([dist.P2POp(call, each, peer, self.group) for call, each, peer in calls])
        return [call(each, peer, self.group) for call, each, peer in calls]

    def parts(self, step: int, tokens: int) -> tuple[int, int]:
        """How many of a rank's queries attend to how many of the keys that come at a step of the forward pass."""
        if step == 0:
            return tokens, tokens
        return (tokens, tokens // 2) if step <= self.rank else (tokens // 2, tokens)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring, count: Callable[[float], None]
    ) -> Tensor:
        tokens, rows, heads, width = query.shape
        pairs = [torch.cat((key.reshape(-1), value.reshape(-1)))]  # of every rank; all stay until the end (:1360)
        outs, statistics, ctx.flops = [], [], []
        under_way: list[Any] = []
        for step in range(ring.size):
            for each in under_way:
                each.wait()
            under_way = []
            if step < ring.size - 1:
                pairs.append(torch.empty_like(pairs[step]))
                under_way = ring.exchange(pairs[step], pairs[step + 1], ahead=1)
            queries, keys = ring.parts(step, tokens)
            seen = pairs_of(queries, keys, causal=True) if step == 0 else float(queries * keys)
            outs.append(torch.empty_like(query[tokens - queries :]))
            statistics.append(query.new_empty((rows, heads, queries), dtype=torch.float32))
            ctx.flops.append(4.0 * rows * heads * width * seen)
            count(ctx.flops[-1])
        total = statistics[0].clone()  # :1591
        out = torch.zeros_like(query)  # the first part's, corrected; the others are added in place (:1638)
        for _ in range(1, ring.size):
            total.add_(0)
            out.add_(0)
        ctx.ring, ctx.count, ctx.shape = ring, count, key.shape
        ctx.save_for_backward(query, pairs[-1], out, total)  # :1784
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ring, tokens = ctx.ring, ctx.shape[0]
        query, pair, out, total = ctx.saved_tensors
        gradient = gradient.contiguous()
        second_half = total[..., tokens // 2 :].contiguous() if ring.rank < ring.size - 1 else None  # :1928
        of_query = torch.empty_like(query)
        buffers = [pair.new_empty((2, *pair.shape)) for _ in range(2)]  # keys and values, and their gradients (:2035)
        buffers[0][0].copy_(pair)
        for step in range(ring.size):
            first, last = step == 0, step == ring.size - 1
            parts = 0 if first else 1 if last else slice(None)
            sent, received = buffers[step % 2][parts], buffers[(step + 1) % 2][parts]
            under_way = ring.exchange(sent, received, ahead=-1)
            queries, keys = ring.parts(ring.size - 1 - step, tokens)
            made = [torch.empty_like(query[tokens - queries :])]
            made += [pair.new_empty((keys, *ctx.shape[1:])) for _ in range(2)]
            ctx.count(2 * ctx.flops[ring.size - 1 - step])
            of_query.add_(0)
            for each in under_way:
                each.wait()
            for _ in range(2):
                buffers[(step + 1) % 2][1].add_(0)  # the keys' and the values'
            del made
        del second_half
        of_key, of_value = buffers[ring.size % 2][1].chunk(2)
        return of_query, of_key.view(ctx.shape), of_value.view(ctx.shape), None, None


def ring_attention(query: Tensor, key: Tensor, value: Tensor, ring: Ring, count: Callable[[float], None]) -> Tensor:
    """Attention of ``[Q, B, heads, D]`` over all ranks' ``[Q, B, groups, D]``; returns ``[Q, B, heads x D]``.

    Args:
        count: told the FLOPs of a pass.
    """
    return _RingAttention.apply(query, key, value, ring, count)
