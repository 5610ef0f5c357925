"""torch.distributed for one rank of many that are not there: groups of any ranks, over which nothing is sent.

Applied only in the forked processes of :mod:`nemo_pre.rehearsal`. Tensors' calls reach torch's dispatcher, where the
rehearsal notes them; calls of objects and batches of messages are caught here, since the dispatcher does not see them
as what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from nemo_pre.compat.registry import Patch, patch


class Listener(Protocol):
    """Who notes what this rank does in its groups, and knows what others say."""

    def objects(self, kind: str, mine: Any, ranks: Sequence[int]) -> list[Any]:
        """What every one of ``ranks`` gave to a collective of objects, in their order."""

    def barrier(self, ranks: Sequence[int]) -> None:
        """All of ``ranks`` wait for each other."""

    def batch(self) -> AbstractContextManager[None]:
        """The messages inside are one NCCL group call."""

    def reduction(self, op: Any) -> AbstractContextManager[None]:
        """The all-reduce inside is of this kind."""


def groups_without_ranks(rank: int, world: int, listener: Listener) -> Patch:
    """The patch that makes this process rank ``rank`` of ``world``."""

    @patch(
        "groups-without-ranks",
        why="A rehearsed rank is alone: torch's fake backend stands for NCCL and gloo, and what it cannot say, the"
        " objects of other ranks, is asked of the rehearsal.",
        until="torch's fake process group carries objects and tells of batches.",
        of={"torch": ("2.9", "2.11")},
    )
    def effects():
        import torch.distributed as dist
        from torch.distributed import distributed_c10d
        from torch.testing._internal.distributed.fake_pg import FakeStore

        from nemo_pre.compat.registry import Change

        init, new_group, all_reduce = dist.init_process_group, dist.new_group, dist.all_reduce
        batch_isend_irecv = dist.batch_isend_irecv

        def members(group: Any) -> list[int]:
            return dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)

        def init_process_group(backend=None, *args, **kwargs):
            init("fake", rank=rank, world_size=world, store=FakeStore())

        def fake_group(ranks=None, timeout=None, backend=None, pg_options=None, **kwargs):
            kwargs.pop("device_id", None)
            return new_group(ranks, backend="fake", **kwargs)

        def all_gather_object(object_list, obj, group=None):
            object_list[:] = listener.objects("all_gather_object", obj, members(group))

        def gather_object(obj, object_gather_list=None, dst=None, group=None, group_dst=None):
            found = listener.objects("gather_object", obj, members(group))
            if object_gather_list is not None:
                object_gather_list[:] = found

        def broadcast_object_list(object_list, src=None, group=None, device=None, group_src=None):
            ranks = members(group)
            source = src if src is not None else ranks[group_src or 0]
            object_list[:] = listener.objects("broadcast_object_list", list(object_list), ranks)[ranks.index(source)]

        def all_reduce_of(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
            with listener.reduction(op):
                return all_reduce(tensor, op, group, async_op)

        def batched(p2p_op_list):
            with listener.batch():
                return batch_isend_irecv(p2p_op_list)

        def barrier(group=None, *args, **kwargs):
            listener.barrier(members(group))

        for module in (dist, distributed_c10d):
            yield Change(module, "init_process_group", init_process_group)
            yield Change(module, "new_group", fake_group)
            yield Change(module, "all_gather_object", all_gather_object)
            yield Change(module, "gather_object", gather_object)
            yield Change(module, "broadcast_object_list", broadcast_object_list)
            yield Change(module, "all_reduce", all_reduce_of)
            yield Change(module, "batch_isend_irecv", batched)
            yield Change(module, "barrier", barrier)
            yield Change(module, "monitored_barrier", barrier)

    return effects
