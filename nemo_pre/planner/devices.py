"""Data sheets of GPUs, and how much of them a run is taken to get."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_pre.config.schema import ClusterConfig

GB = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Device:
    """A GPU in its usual server of eight, as NVIDIA's data sheets have it (SXM; without sparsity).

    Attributes:
        bf16, fp8, tf32, fp32: dense matrix products, operations a second; fp8 is None where there is none. A product
            of float32 tensors is fp32's unless it is allowed to be TF32's.
        memory: bytes.
        bandwidth: of memory, bytes a second.
        nvlink: to the other GPUs of the server, bytes a second and direction.
        network: to other servers, bytes a second and direction; one 200 (A100) or 400 Gbit/s adapter per GPU.
        per_node: GPUs of a server.
    """

    name: str
    bf16: float
    fp8: float | None
    tf32: float
    fp32: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    per_node: int = 8


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312 * TERA, None, 156 * TERA, 19.5 * TERA, 80 * GB, 2039 * GB, 300 * GB, 25 * GB),
        Device("h100", 989 * TERA, 1979 * TERA, 494 * TERA, 67 * TERA, 80 * GB, 3350 * GB, 450 * GB, 50 * GB),
        Device("h200", 989 * TERA, 1979 * TERA, 494 * TERA, 67 * TERA, 141 * GB, 4800 * GB, 450 * GB, 50 * GB),
        Device("b200", 2250 * TERA, 4500 * TERA, 1125 * TERA, 75 * TERA, 180 * GB, 8000 * GB, 900 * GB, 50 * GB),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """Parts of the data sheet's figures that a run gets: assumptions, to be replaced by measured ones.

    Attributes:
        matrix: of the peak, in matrix products and attention, with the small kernels between them.
        bandwidth: of memory and links, in communication and in the optimizer's step.
        memory: of memory that may be planned for; the rest is fragmentation and spikes.
        overlap: of the gradients' reduction, the part hidden behind backward passes where they overlap.
    """

    matrix: float = 0.5
    bandwidth: float = 0.7
    memory: float = 0.92
    overlap: float = 0.8


def device_of_cluster(cluster: ClusterConfig) -> Device | None:
    """The GPU that ``cluster.gpu`` names, with the memory that ``cluster.gpu_memory_gb`` gives it; None:
    it names none."""
    if cluster.gpu is None:
        return None
    device = DEVICES[cluster.gpu]
    return device if cluster.gpu_memory_gb is None else replace(device, memory=cluster.gpu_memory_gb * GB)
