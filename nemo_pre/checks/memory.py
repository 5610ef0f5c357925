"""Whether a run's fullest rank has memory enough, counted by :mod:`nemo_pre.planner` before anything is built."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from nemo_pre.config.derived import world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.launch.environment import uses_gpu
from nemo_pre.planner.devices import Efficiency, device_of_cluster
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.memory import RankMemory, fullest_rank
from nemo_pre.planner.parameters import model_parameters, rank_parameters

GIB = 1024**3


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of the rank that holds most, in the largest micro-batch the config allows.

    Attributes:
        parameters: of the whole model.
        rank_parameters: of this rank.
        stage: its pipeline stage, from 0.
        memory: what it holds.
        available: bytes it may use; None: not known.
        gpus: of the whole layout.
    """

    parameters: int
    rank_parameters: int
    stage: int
    memory: RankMemory
    available: int | None
    gpus: int

    @property
    def bytes_per_rank(self) -> int:
        """Bytes that live from step to step: weights, gradients, optimizer, and what objectives keep."""
        return sum(self.memory.state.values())

    def summary(self) -> str:
        usual = ("weights", "gradients", "optimizer")
        further = [kind for kind, size in self.memory.state.items() if size and kind not in usual]
        held = f"{', '.join(['parameters', 'gradients', *further])} and"
        return (
            f"{_count(self.parameters)} parameters, {_count(self.rank_parameters)} on the fullest rank: "
            f"{_size(self.bytes_per_rank)} of {held} optimizer state there, about {_size(self.memory.total)} with "
            f"activations" + (f", of {_size(self.available)}" if self.available else "")
        )

    def problem(self) -> str | None:
        """A sentence on a rank that has too little; None: it has enough, or it is not known what it has."""
        if self.available is None or self.memory.total <= self.available:
            return None
        largest = sorted(self.memory.by_kind.items(), key=lambda item: -item[1])[:3]
        return (
            f"A rank of pipeline stage {self.stage + 1} needs about {_size(self.memory.total)} "
            f"({', '.join(f'{kind} {_size(size)}' for kind, size in largest)}) and has {_size(self.available)}: find "
            f"a layout that fits with nemo-pre plan and cluster.gpus={self.gpus}, or try it all the same with "
            f"trainer.ignore_memory_estimate=true."
        )


def estimate_memory(config: RunConfig) -> MemoryEstimate:
    """Count what every pipeline stage holds; on a GPU with Transformer Engine's layers, elsewhere with Megatron's."""
    fused = device_of_cluster(config.cluster.name) is not None or uses_gpu(config.platform)
    stage, memory = fullest_rank(config, largest_load(config), fused)
    return MemoryEstimate(
        parameters=sum(model_parameters(config).values()),
        rank_parameters=sum(rank_parameters(config, stage).values()),
        stage=stage,
        memory=memory,
        available=available_memory(config),
        gpus=world_size(config.parallel),
    )


def available_memory(config: RunConfig) -> int | None:
    """Bytes that a rank may use: of the GPU that ``cluster.name`` starts with, else of what this machine has; of a
    GPU the part that :class:`~nemo_pre.planner.devices.Efficiency` plans for. None: not known."""
    named = device_of_cluster(config.cluster.name)
    if named is not None:
        return round(named.memory * Efficiency().memory)
    if not uses_gpu(config.platform):
        if config.cluster.name != "local":  # described here, run elsewhere
            return None
        ranks_per_node = world_size(config.parallel) // config.cluster.nodes
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_per_node
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listing = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    sizes = [int(word) for word in listing if word.isdigit()]  # MiB
    return round(min(sizes) * 1024**2 * Efficiency().memory) if sizes else None


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _size(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 1024**2:.0f} MiB"
