"""A rehearsed rank's process groups: calls are noted and answered, nothing is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from nemo_pre.compat.rehearsed_device import TWIN
from nemo_pre.rehearsal.calls import HOST, NUMBERS, SETUP, Call, Log
from nemo_pre.rehearsal.lines import line_of_code

# A collective of objects, or of numbers on the host: what it is called on all ranks, what this one gives, the ranks.
Exchange = Callable[[str, Any, Sequence[int]], list[Any]]

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_coalesced_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "send": "send",
    "recv_": "recv",
}
INPUT_IS_SECOND = {
    "_allgather_base_",
    "allgather_",
    "_reduce_scatter_base_",
    "reduce_scatter_",
    "alltoall_base_",
    "alltoall_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
}
GIVEN = "_given"  # of a tensor that an all-reduce has filled: what this rank gave, the group's ranks, the operation
WORK_ALONE = {
    "reduce_",
    "alltoall_base_",
    "barrier",
    "send",
    "recv_",
    "recv_any_source_",
    "allreduce_coalesced_",
    "allgather_coalesced_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
}


class _Noted(Work):
    """The handle of a call; that it is waited for is noted."""

    def __init__(self, log: Log, number: int) -> None:
        super().__init__()
        self._log, self._number = log, number

    def wait(self, timeout: Any = None) -> bool:
        self._log.wait(self._number)
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True


class Groups:
    """What :mod:`nemo_pre.compat.rehearsed_groups` asks, and what the device's calls of groups do.

    Args:
        exchange: asks the other ranks' processes for their objects.

    Attributes:
        phase: :data:`~nemo_pre.rehearsal.calls.SETUP`, or the number of the step.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.log = Log()
        self.phase = SETUP
        self._exchange = exchange
        self._objects: dict[tuple[int, ...], int] = {}
        self._batch: int | None = None
        self._batches = 0
        self._op: Any = None
        self._works: list[Work] = []  # torch holds a handle by a pointer alone while it goes through its dispatcher

    # --- calls of tensors -------------------------------------------------------------------------------------------

    def call(self, func: Any, args: Any, tensors: list[torch.Tensor]) -> Any:
        """Note a call of torch's dispatcher; returns what it does."""
        name = func._schema.name.split("::")[1]
        if name == "monitored_barrier_":
            return None
        group = next(ProcessGroup.unbox(arg) for arg in args if _is_group(arg))
        ranks = tuple(dist.get_process_group_ranks(group))
        given = [leaf for leaf in tree_leaves(args[name in INPUT_IS_SECOND]) if isinstance(leaf, torch.Tensor)]
        peer = None
        if name in ("send", "recv_", "broadcast_"):
            peer = ranks[args[2]]
        number = self.log.call(
            Call(
                kind=KINDS.get(name, name.strip("_")),
                group=str(group.group_name),
                ranks=ranks,
                bytes=sum(tensor.numel() * tensor.element_size() for tensor in given),
                dtype=str(given[0].dtype).removeprefix("torch.") if given else "",
                device=given[0].device.type if given else HOST,
                peer=peer,
                batch=self._batch if name in ("send", "recv_") else None,
                phase=self.phase,
                where=line_of_code(2),
            )
        )
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            self._answer(name, args, ranks)
        for tensor in tensors:
            if isinstance(tensor, FakeTensor) and name not in ("send", "barrier"):
                mine = getattr(tensor, TWIN, None) if name == "allreduce_" else None
                setattr(tensor, TWIN, None)  # it holds what others sent
                setattr(tensor, GIVEN, None if mine is None else (mine.clone(), ranks, self._op))
        work = _Noted(self.log, number)
        self._works = [*self._works[-63:], work]
        return work.boxed() if name in WORK_ALONE else (args[0], work.boxed())

    def _answer(self, name: str, args: Any, ranks: tuple[int, ...]) -> None:
        """Fill in real tensors of the host what comes out of what all ranks give.

        Raises:
            NotImplementedError: the host does something else with its tensors than the project's code ever does.
        """
        if name == "allreduce_":
            for tensor in args[0]:
                given = torch.stack(self._ask(name, tensor, ranks))
                tensor.copy_(_reduced(given, self._op).view_as(tensor))
        elif name == "_allgather_base_":
            found = [each.flatten() for each in self._ask(name, args[1], ranks)]
            args[0].copy_(torch.cat(found).view_as(args[0]))
        elif name == "allgather_":
            for outs, value in zip(args[0], args[1], strict=True):
                for out, each in zip(outs, self._ask(name, value, ranks), strict=True):
                    out.copy_(each.view_as(out))
        elif name == "broadcast_":
            for tensor in args[0]:
                tensor.copy_(self._ask(name, tensor, ranks)[args[2]].view_as(tensor))
        elif name not in ("send", "barrier"):
            raise NotImplementedError(f"{name} of tensors of the host is not rehearsed ({line_of_code(2)}).")

    def _ask(self, kind: str, tensor: torch.Tensor, ranks: tuple[int, ...]) -> list[torch.Tensor]:
        """What all ranks give."""
        found = self._exchange(self._number(NUMBERS + kind, ranks), tensor.tolist(), ranks)
        return [torch.as_tensor(each, dtype=tensor.dtype) for each in found]

    def _number(self, kind: str, ranks: tuple[int, ...]) -> str:
        """What this collective is called among those of the same ranks, on all of them."""
        number = self._objects[ranks] = self._objects.get(ranks, 0) + 1
        return f"{kind} {number}"

    def reduced(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What an all-reduce made of a tensor of the device that nothing has been written to since, worked out when
        the host asks for it; None where it is not known. All ranks of the group must ask, as they do of a flag."""
        given = getattr(tensor, GIVEN, None)
        if given is None:
            return None
        mine, ranks, op = given
        return _reduced(torch.stack(self._ask("allreduce_", mine, ranks)), op).view_as(mine)

    # --- calls that torch's dispatcher does not see -----------------------------------------------------------------

    def objects(self, kind: str, mine: Any, ranks: Sequence[int]) -> list[Any]:
        members = tuple(ranks)
        self._host_call(kind, members)
        return self._exchange(self._number(kind, members), mine, members)

    def barrier(self, ranks: Sequence[int]) -> None:
        self._host_call("barrier", tuple(ranks))

    def _host_call(self, kind: str, ranks: tuple[int, ...]) -> None:
        name = "objects of " + ",".join(map(str, ranks))
        self.log.wait(self.log.call(Call(kind, name, ranks, 0, "", HOST, phase=self.phase, where=line_of_code(2))))

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        self._batches += 1
        self._batch = self._batches
        try:
            yield
        finally:
            self._batch = None

    @contextlib.contextmanager
    def reduction(self, op: Any) -> Iterator[None]:
        before, self._op = self._op, op
        try:
            yield
        finally:
            self._op = before


def _reduced(given: torch.Tensor, op: Any) -> torch.Tensor:
    """What an all-reduce makes of ``[ranks, ...]``."""
    if op == dist.ReduceOp.MAX:
        return given.amax(0)
    if op == dist.ReduceOp.MIN:
        return given.amin(0)
    if op == dist.ReduceOp.AVG:
        return given.double().mean(0)
    return given.sum(0)


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())
