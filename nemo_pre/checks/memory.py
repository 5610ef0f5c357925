"""Whether a run's fullest rank has memory enough, counted by :mod:`nemo_pre.planner` before anything is built."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from nemo_pre.config.derived import world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ClusterConfig
from nemo_pre.launch.environment import machine_memory, uses_gpu
from nemo_pre.planner.devices import DEVICES, GB, Efficiency, device_of_cluster
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
        owner: whose these are.
        gpus: of the whole layout; None on CPUs.
    """

    parameters: int
    rank_parameters: int
    stage: int
    memory: RankMemory
    available: int | None
    owner: str
    gpus: int | None

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
            f"activations" + (f", of {_size(self.available)} of {self.owner}" if self.available else "")
        )

    def problem(self) -> str | None:
        """A sentence on a rank that has too little; None: it has enough, or it is not known what it has."""
        if self.available is None or self.memory.total <= self.available:
            return None
        largest = sorted(self.memory.by_kind.items(), key=lambda item: -item[1])[:3]
        layout = f"find a layout that fits with nemo-pre plan and cluster.gpus={self.gpus}"
        elsewhere = "send it where there are GPUs (nemo-pre submit ... cluster=SITE), take a smaller model"
        return (
            f"A rank of pipeline stage {self.stage + 1} needs about {_size(self.memory.total)} "
            f"({', '.join(f'{kind} {_size(size)}' for kind, size in largest)}) and has {_size(self.available)} of "
            f"{self.owner}: {layout if self.gpus else elsewhere}, or try it all the same with "
            f"trainer.ignore_memory_estimate=true."
        )


def estimate_memory(config: RunConfig, starts_here: bool = False) -> MemoryEstimate:
    """Count what every pipeline stage holds; on a GPU with Transformer Engine's layers, elsewhere with Megatron's.

    Args:
        starts_here: the ranks are about to start on this machine, or have; otherwise the run is only described here.
    """
    on_gpu = goes_to_gpus(config, starts_here)
    stage, memory = fullest_rank(config, largest_load(config), on_gpu)
    available, owner = _memory_of_a_gpu(config, starts_here) if on_gpu else _memory_of_a_cpu_rank(config, starts_here)
    return MemoryEstimate(
        parameters=sum(model_parameters(config).values()),
        rank_parameters=sum(rank_parameters(config, stage).values()),
        stage=stage,
        memory=memory,
        available=available,
        owner=owner,
        gpus=world_size(config.parallel) if on_gpu else None,
    )


def goes_to_gpus(config: RunConfig, starts_here: bool = False) -> bool:
    """Whether the run's ranks compute on GPUs. What ``platform`` says counts before what the cluster has; with
    ``platform=auto`` a run that starts here takes what this machine has, and one that is only described the
    cluster's."""
    if config.platform == "auto" and not starts_here and names_gpu(config.cluster):
        return True
    return uses_gpu(config.platform)


def names_gpu(cluster: ClusterConfig) -> bool:
    """Whether the cluster says what its GPUs hold."""
    return cluster.gpu is not None or cluster.gpu_memory_gb is not None


def missing_gpu(config: RunConfig) -> str | None:
    """The sentence that asks for the GPU of a cluster that a job is submitted to; None where it is known, or where no
    GPU is used."""
    cluster = config.cluster
    if config.platform == "cpu" or names_gpu(cluster) or config.trainer.ignore_memory_estimate:
        return None
    return (
        f"cluster={cluster.name} does not say which GPU its nodes have, so nobody knows whether the run fits: set "
        f"cluster.gpu={'|'.join(DEVICES)}, cluster.gpu_memory_gb=GB for another one, or platform=cpu."
    )


def _memory_of_a_gpu(config: RunConfig, starts_here: bool) -> tuple[int | None, str]:
    """Bytes of a GPU that a rank may plan for (:class:`~nemo_pre.planner.devices.Efficiency`), and whose they are: of
    this machine's own where the run starts on it, else of the cluster's."""
    part = Efficiency().memory
    own = _smallest_gpu_here() if starts_here or not names_gpu(config.cluster) else None
    if own is not None:
        return round(own * part), "this machine's GPU"
    device, cluster = device_of_cluster(config.cluster), config.cluster
    if device is not None:
        return round(device.memory * part), f"one of the cluster's GPUs ({device.name})"
    if cluster.gpu_memory_gb is not None:
        return round(cluster.gpu_memory_gb * GB * part), "one of the cluster's GPUs"
    return None, ""


def _smallest_gpu_here() -> int | None:
    """Bytes of the smallest GPU that ``nvidia-smi`` lists; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listing = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    sizes = [int(word) for word in listing if word.isdigit()]  # MiB
    return min(sizes) * 1024**2 if sizes else None


def _memory_of_a_cpu_rank(config: RunConfig, starts_here: bool) -> tuple[int, str]:
    """A rank's share of its node's memory: what the cluster says a job gets, else what this machine lets a process
    have, also as the measure of nodes that are described here."""
    ranks = world_size(config.parallel) // config.cluster.nodes
    of_ranks = f", shared by {ranks} ranks," if ranks > 1 else ""
    if not starts_here and config.cluster.memory_per_node is not None:
        said = slurm_bytes(config.cluster.memory_per_node)
        if said is not None:
            return said // ranks, f"cluster.memory_per_node={config.cluster.memory_per_node}{of_ranks}".rstrip(",")
    auto = " (platform=auto finds no NVIDIA GPU here)" if config.platform == "auto" else ""
    return machine_memory() // ranks, f"this machine's memory{of_ranks}".rstrip(",") + auto


def slurm_bytes(text: str) -> int | None:
    """What ``sbatch --mem`` means: a number of megabytes, or one with K, M, G or T; None for 0, all of a node."""
    size = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if size is None or not int(size[1]):
        return None
    return int(size[1]) * 1024 ** " KMGT".index(size[2].upper() or "M")


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _size(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 1024**2:.0f} MiB"
