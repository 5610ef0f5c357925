"""What CUDA, NCCL, Transformer Engine and PyTorch read from a GPU rank's environment before they start.

Source: NeMo 2.7's ``PerfEnvPlugin`` (``nemo/lightning/run/plugins.py``), which sets all but the allocator's for
NVIDIA's own recipes. Nothing heavy is imported, and nothing is set that the user has set.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping

from nemo_pre.config.derived import world_size
from nemo_pre.config.schema import ParallelConfig

BLACKWELL = 10  # the major number of its compute capability
NORM_MARGIN = "16"  # multiprocessors, of 132 of an H100
FORMER_NAMES = {"PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF"}  # under which the user may have set the same


def gpu_settings(layout: ParallelConfig, capability: int | None) -> dict[str, str]:
    """The environment variables of a rank.

    Args:
        capability: the GPU's compute capability, its major number; None where nothing tells it.
    """
    # Steps differ in length: of fixed segments ever more would be of a size that nobody asks for again.
    settings = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if world_size(layout) > 1:
        # Transformer Engine's norms take every multiprocessor they may have, and a message would wait for their end.
        settings |= {f"NVTE_{way}_LAYERNORM_SM_MARGIN": NORM_MARGIN for way in ("FWD", "BWD")}
        settings["TORCH_NCCL_HIGH_PRIORITY"] = "1"  # a message's kernels begin before those that wait beside them
    if (layout.tensor > 1 or layout.context > 1) and capability is not None:
        # Before Blackwell one queue keeps kernels in the order of their launch: a message that runs beside a matrix
        # product must begin before it, or the product takes all multiprocessors first. Later GPUs need no order, and
        # want a queue for each stream.
        settings["CUDA_DEVICE_MAX_CONNECTIONS"] = "1" if capability < BLACKWELL else "32"
    return settings


def set_gpu_environment(layout: ParallelConfig, environment: MutableMapping[str, str] = os.environ) -> None:
    """Put :func:`gpu_settings` of this machine's GPU into the environment, where the user has not set them."""
    cut = layout.tensor > 1 or layout.context > 1
    for name, value in gpu_settings(layout, compute_capability() if cut else None).items():
        if not is_set(name, environment):
            environment[name] = value


def is_set(name: str, environment: Mapping[str, str]) -> bool:
    """Whether the user has set a variable, under any of its names."""
    return name in environment or FORMER_NAMES.get(name, name) in environment


def compute_capability() -> int | None:
    """The major number of the first GPU's, without importing torch; None where ``nvidia-smi`` does not say it."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"(\d+)\.\d+\s*$", listing, re.MULTILINE)
    return int(found[1]) if found else None
