"""Carries the detached anchor from the first pipeline stage straight to the stages that need it.

The anchor travels in process groups of its own, so it neither changes the activations' shape nor the order of the
schedule's own messages. Why this cannot deadlock, under 1F1B and interleaved 1F1B alike:

- Sends are asynchronous, and the first stage never waits for one before the step's end. NCCL makes the communicator
  of a pair of ranks at its first message, and both wait meanwhile: hence :meth:`AnchorExchange.connect`.
- A stage asks for micro-batch i's anchor only while it runs micro-batch i, whose activations left the first stage
  after the anchor was sent.
- Model chunks run their micro-batches in ascending order, and a stage's first tapped chunk gets micro-batch i
  before its later ones do; so both ends name the micro-batches of a pair in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FIRST_STAGE = 0


@dataclass
class _Incoming:
    buffer: Tensor
    work: dist.Work | None
    readers_left: int


@dataclass
class AnchorExchange:
    """One rank's end of the exchange.

    Args:
        group: process group of this pipeline's ranks, in stage order, used for nothing else.
        stage: this rank's pipeline stage.
        readers: for every stage, how many taps on it (over all its virtual stages) read each anchor.
    """

    group: dist.ProcessGroup
    stage: int
    readers: Sequence[int]
    _incoming: dict[int, _Incoming] = field(default_factory=dict)
    _outgoing: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    @classmethod
    def install(cls, taps: int, device: torch.device) -> AnchorExchange:
        """An exchange over this rank's pipeline. Every rank of the job must call this, in the same order of terms.

        Args:
            taps: how many taps this rank has, over all its virtual stages.
            device: where anchors are computed and read.
        """
        from megatron.core import parallel_state as ps

        group, stage = anchor_group(), ps.get_pipeline_model_parallel_rank()
        readers: list[Any] = [None] * group.size()
        dist.all_gather_object(readers, taps, group=group)
        exchange = cls(group, stage, readers)
        exchange.connect(device)
        return exchange

    def connect(self, device: torch.device) -> None:
        """A first message to every stage with a reader, before the schedule starts. Every rank must call this."""
        message = torch.zeros(1, device=device)
        if self.stage == FIRST_STAGE:
            for stage, readers in enumerate(self.readers):
                if readers and stage != FIRST_STAGE:
                    dist.send(message, group=self.group, group_dst=stage)
        elif self.readers[self.stage]:
            dist.recv(message, group=self.group, group_src=FIRST_STAGE)

    def publish(self, micro_batch: int, anchor: Tensor) -> None:
        """Hand micro-batch ``micro_batch``'s anchor, ``[n, d]``, from the first stage to every stage with a reader."""
        anchor = anchor.detach().contiguous()
        if self.readers[FIRST_STAGE]:
            self._incoming[micro_batch] = _Incoming(anchor, None, self.readers[FIRST_STAGE])
        self._outgoing = [(work, tensor) for work, tensor in self._outgoing if not work.is_completed()]
        if _is_empty(anchor.shape):
            return  # every stage knows from the token ids that there is nothing to receive
        for stage, readers in enumerate(self.readers):
            if readers and stage != FIRST_STAGE:
                work = dist.isend(anchor, group=self.group, group_dst=stage, tag=micro_batch)
                self._outgoing.append((work, anchor))

    def expect(self, micro_batch: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """Start receiving, so that the transfer runs while the layers before the tap do."""
        if self.stage == FIRST_STAGE or micro_batch in self._incoming:
            return
        buffer = torch.empty(shape, dtype=dtype, device=device)
        work = None
        if not _is_empty(shape):
            work = dist.irecv(buffer, group=self.group, group_src=FIRST_STAGE, tag=micro_batch)
        self._incoming[micro_batch] = _Incoming(buffer, work, self.readers[self.stage])

    def take(self, micro_batch: int) -> Tensor:
        """The anchor; forgotten once every reader of this stage has taken it."""
        assert micro_batch in self._incoming, (
            f"micro-batch {micro_batch}'s anchor was never asked for: expect() belongs to on_micro_batch of a chunk"
        )
        incoming = self._incoming[micro_batch]
        if incoming.work is not None:
            incoming.work.wait()
            incoming.work = None
        incoming.readers_left -= 1
        if incoming.readers_left == 0:
            del self._incoming[micro_batch]
        return incoming.buffer

    def finish_step(self) -> None:
        """Wait for sends still under way and check that nothing is left over."""
        for work, _ in self._outgoing:
            work.wait()
        self._outgoing.clear()
        assert not self._incoming, f"anchors of micro-batches {sorted(self._incoming)} were never read"


def _is_empty(shape: Sequence[int]) -> bool:
    """Whether an anchor of this shape is no message: both ends ask here, or one of them would wait for ever."""
    return math.prod(shape) == 0


def anchor_group() -> dist.ProcessGroup:
    """A new process group over this rank's pipeline, in stage order. Every rank of the job must call this."""
    from megatron.core import parallel_state as ps

    pipelines: list[list[int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(pipelines, dist.get_process_group_ranks(ps.get_pipeline_model_parallel_group()))
    mine = None
    for ranks in sorted({tuple(ranks) for ranks in pipelines if ranks is not None}):
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None
    return mine
