"""What the machine is, and what can be imported there."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.gpu.first_contact.record import Absent, Record
from nemo_pre.compat import versions as supported
from nemo_pre.launch.environment import machine_memory
from nemo_pre.planner.devices import DEVICES, Device

DISTRIBUTIONS = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "nemo_toolkit",
    "megatron-core",
    "lightning",
    "transformer-engine",
    "megatron-bridge",
    "hydra-core",
)
# Megatron-Core compiles an extension where it is imported alone; nemo-pre, and every step here, keeps it from that.
BEFORE = "from nemo_pre.launch.environment import prepare_environment; prepare_environment(); "
# In this order in its process: Transformer Engine finds its libraries behind torch alone.
IMPORTS = {
    "torch": "import torch",
    "Transformer Engine": "import torch, transformer_engine.pytorch",
    "Megatron-Core": "import megatron.core.models.gpt, megatron.core.distributed, megatron.core.optimizer",
    "NeMo": "import nemo.lightning, nemo.collections.llm, nemo.collections.vlm",
    "nemo-pre's training": "import nemo_pre.train, nemo_pre.nemo.module, nemo_pre.callbacks.metrics",
}
AFTERWARDS = "; import torch; print('CUDA in use' if torch.cuda.is_initialized() else 'CUDA untouched')"
BRIDGE = "megatron.bridge"


def versions(record: Record) -> None:
    """The versions, the GPU, and what its memory and its matrix units give beside the data sheet."""
    for name in DISTRIBUTIONS:
        try:
            record.fact(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            record.fact(name, "not installed")
    record.fact("python", platform.python_version())
    record.fact("cores", len(os.sched_getaffinity(0)))
    record.fact("host memory, GiB", round(machine_memory() / 2**30, 1))
    record.fact("free on the disk, GiB", round(shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free / 2**30, 1))
    try:
        supported.check()
        refused = ""
    except ValueError as error:
        refused = str(error)
    record.check("versions that nemo-pre accepts", refused or "accepted", "accepted", not refused)
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,compute_cap,clocks.sm,clocks.mem"
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        record.fact("nvidia-smi", told.stdout.strip() or told.stderr.strip())
    record.only_with_a_gpu("torch.cuda.get_device_properties")
    _rates(record)


def data_sheet() -> Device:
    """The planner's data sheet of this process's GPU.

    Raises:
        ValueError: the planner does not know it.
    """
    import torch

    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    for known, device in DEVICES.items():
        if name.startswith(known):
            return device
    raise ValueError(f"The planner has no data sheet of {name}, beside which its figures could be put.")


def _rates(record: Record) -> None:
    import torch

    properties = torch.cuda.get_device_properties(0)
    capability = f"sm_{properties.major}{properties.minor}"
    record.fact("gpu", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, {capability}")
    sheet = data_sheet()
    record.near("device memory, GB", properties.total_memory / 1e9, sheet.memory / 1e9, 0.08, "the data sheet's")
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / _seconds(lambda: left @ right)
    record.between("bf16 product of 8192, part of the data sheet's rate", product / sheet.bf16, 0.5, 1.0)
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / _seconds(lambda: target.copy_(source))
    record.between("copy of 4 GiB, part of the data sheet's bandwidth", moved / sheet.bandwidth, 0.7, 1.0)


def _seconds(act: Callable[[], Any]) -> float:
    """Median of ten, after three."""
    import torch

    times = []
    for _ in range(13):
        torch.cuda.synchronize()
        began = time.perf_counter()
        act()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def imports(record: Record) -> None:
    """Each in a process of its own, all at once: an import can end a process."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(_import, IMPORTS.values())
        for name, (error, said, seconds) in zip(IMPORTS, found, strict=True):
            record.fact(f"{name}, seconds", round(seconds, 1))
            record.check(f"import of {name}", error or f"imported ({said})", "imported", not error)


def _import(statement: str) -> tuple[str, str, float]:
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", BEFORE + statement + AFTERWARDS], capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    if run.returncode == 0:
        return "", (run.stdout.strip().splitlines() or [""])[-1], seconds
    print(f"----- {statement}\n{run.stderr[-4000:]}", flush=True)
    last = ([line for line in run.stderr.splitlines() if line.strip()] or [f"exit code {run.returncode}"])[-1]
    return last[:200], "", seconds


def bridge(record: Record) -> None:
    """Megatron-Bridge's list in docs/megatron-bridge.md, as far as one GPU and the packs carry it.

    Raises:
        Absent: Megatron-Bridge cannot be imported.
    """
    error, said, seconds = _import(f"import torch, {BRIDGE}, {BRIDGE}.training.pretrain")
    if error:
        raise Absent(f"{BRIDGE} is not importable: {error}")
    record.check(f"import of {BRIDGE}", f"imported in {seconds:.0f} s ({said})", "imported", True)
    record.only_with_a_gpu(f"{BRIDGE}.training.pretrain")
    record.check("its training", "no step of it ran", "the list of docs/megatron-bridge.md, by hand", False)
