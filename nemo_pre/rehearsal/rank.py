"""One rehearsed rank: the run's own training, of the backend that is installed, on a device that is not there."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from nemo_pre.compat import versions
from nemo_pre.config.derived import world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.rehearsal.found import Found, Order

Exchange = Callable[[str, Any, Any], list[Any]]


def rehearse(order: Order, exchange: Exchange, progress: Callable[[str], None]) -> Found:
    """Run the rank's steps in this process, which is good for nothing else afterwards.

    Args:
        exchange: a collective of objects, see :data:`nemo_pre.rehearsal.groups.Exchange`.
        progress: told what the rank begins with.
    """
    started = time.monotonic()
    _become(order)
    import torch

    from nemo_pre.compat import cpu_device, rehearsed_device, rehearsed_groups, rehearsed_kernels
    from nemo_pre.rehearsal.device import Rehearsed
    from nemo_pre.rehearsal.groups import Groups
    from nemo_pre.rehearsal.memory import Memory
    from nemo_pre.rehearsal.seams import seams

    torch.set_num_threads(1)
    _look_at_targets(order.config)
    config, layout = order.config, order.config.parallel
    groups = Groups(exchange)
    device = Rehearsed(groups, Memory(order.named_from))
    per_node = world_size(layout) // config.cluster.nodes
    for each in (
        rehearsed_device.device_guard_without_driver,
        rehearsed_device.cuda_without_gpu(per_node, device.memory),
        rehearsed_device.fake_data,
        rehearsed_device.no_move_at_the_end,
        rehearsed_groups.groups_without_ranks(order.rank, world_size(layout), groups),
        rehearsed_kernels.attention_without_kernels(device.count_flops),
        rehearsed_kernels.fused_adamw,
        rehearsed_kernels.swiglu_in_one_kernel,
        cpu_device.no_compilation,
        *_patches_of_the_run(config),
        *seams(device, order.micro_batches * (layout.virtual_pipeline or 1)),
    ):
        each.apply()
    found = _train(order, device, progress)
    found.seconds = time.monotonic() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found.cpu, found.host_bytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return found


def _become(order: Order) -> None:
    """Be the rank, for torch, Lightning and NeMo."""
    import warnings

    warnings.simplefilter("ignore")
    layout, nodes = order.config.parallel, order.config.cluster.nodes
    per_node = world_size(layout) // nodes
    os.environ.update(
        RANK=str(order.rank),
        NODE_RANK=str(order.rank // per_node),
        LOCAL_RANK=str(order.rank % per_node),
        WORLD_SIZE=str(world_size(layout)),
        LOCAL_WORLD_SIZE=str(per_node),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29511",
    )


def _patches_of_the_run(config: RunConfig) -> Iterator[Any]:
    """The patches of a run on GPUs, and of CPU ranks' those that stand for Transformer Engine's AdamW."""
    from nemo_pre.compat import checkpoints, cpu_megatron, distributed_setup, learning_rates, progress, telemetry

    if versions.installed("nemo_toolkit") is not None:
        for patches in (checkpoints, learning_rates, progress, telemetry):
            patches.apply()
        distributed_setup.apply(config.seed, timedelta(seconds=config.trainer.rank_timeout))
    yield cpu_megatron.rng_tracker_on_cpu
    yield cpu_megatron.group_step_adamw  # the same states as FusedAdam's


def _look_at_targets(config: RunConfig) -> None:
    """Have the facts of frozen vision models worked out, which is no part of a step."""
    from nemo_pre.objectives.registry import wanted_targets
    from nemo_pre.terms.vision_facts import vision_facts

    for target in wanted_targets(config).values():
        if target.features is None:
            vision_facts(target)


def _train(order: Order, device: Any, progress: Callable[[str], None]) -> Found:
    from nemo_pre.rehearsal.watch import Watch

    if versions.installed("nemo_toolkit") is not None:
        from nemo_pre.rehearsal.with_nemo import train
    else:
        from nemo_pre.rehearsal.with_core import train
    found = Found(order.place, order.rank)
    with device:
        train(order, Watch(order, device, found, progress))
    found.log = device.groups.log
    return found
