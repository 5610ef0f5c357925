"""Distributed checkpoints that hold what was saved: on CPUs and GPUs alike."""

from __future__ import annotations

import inspect
import os
import pickle
from multiprocessing.managers import SyncManager
from typing import Any

from nemo_pre.compat.registry import Change, patch


class _PickledQueue:
    """A queue of a server process that never unpickles what passes through it.

    The server would import torch to hold a writer's results: two seconds and half a gigabyte on every rank.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, result: Any) -> None:
        self._queue.put(pickle.dumps(result))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


@patch(
    "results-queue-per-save",
    why="Every asynchronous save of a rank reports what it wrote where through one queue. If a second save (that at"
    " the end of training, say) is written before the first is finalised, the two swap their reports on that rank,"
    " and both checkpoints miss tensors in their metadata, without a word until they are loaded.",
    until="FileSystemWriterAsync makes a queue of its own.",
    of={"megatron-core": ("0.15.3",)},
    unneeded={"megatron-core 0.19": "every save has a queue of its own"},
)
def results_queue_per_save():
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    from torch import multiprocessing

    from nemo_pre.orphans import die_with

    managers: list[Any] = []  # one server process per rank, started by the first save

    def get_write_results_queue() -> Any:
        if not managers:
            manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
            manager.start(die_with, (os.getpid(),))
            managers.append(manager)
        return _PickledQueue(managers[0].Queue())

    yield Change(filesystem_async, "_get_write_results_queue", get_write_results_queue, written_for="349269cbdd56")


@patch(
    "dp-reshardable-load",
    why="Alone among DistributedOptimizer's load functions the one for dp_reshardable records gradients, and copying"
    " into a float32 parameter, which with float32 weights is its own main parameter, then raises.",
    until="load_parameter_state_from_dp_reshardable is decorated with torch.no_grad(), as its neighbours are.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def dp_reshardable_load():
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load = DistributedOptimizer.load_parameter_state_from_dp_reshardable
    yield Change(DistributedOptimizer, "load_parameter_state_from_dp_reshardable", torch.no_grad()(load))


@patch(
    "checksums-of-torchs-writer",
    why="A checkpoint whose bytes change on the disk is loaded without a word. Checksums made afterwards would read it"
    " all again.",
    until="torch writes checksums into the metadata of its checkpoints, and compares them.",
    of={"torch": ("2.9", "2.11")},
)
def checksums_of_torchs_writer():
    from torch.distributed.checkpoint import filesystem

    from nemo_pre.checkpoint_files.checksums import with_checksums

    yield Change(filesystem, "_write_item", with_checksums(filesystem._write_item))


@patch(
    "checksums-of-megatrons-writer",
    why="The same, where Megatron writes: in a process of its own beside training.",
    until="torch's does it.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def checksums_of_megatrons_writer():
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async
    from torch.distributed.checkpoint import filesystem

    from nemo_pre.checkpoint_files.checksums import with_checksums

    # Megatron's module took torch's function when it was imported, which may have been patched by then.
    plain = inspect.unwrap(filesystem._write_item)
    yield Change(filesystem_async, "_write_item", with_checksums(plain))


PATCHES = [results_queue_per_save, dp_reshardable_load, checksums_of_torchs_writer, checksums_of_megatrons_writer]


def apply() -> None:
    """Apply the patches of this module; a second call does nothing."""
    for each in PATCHES:
        each.apply()


def revert() -> None:
    """Restore what was there before :func:`apply`."""
    for each in reversed(PATCHES):
        each.revert()
