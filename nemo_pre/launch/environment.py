"""What this process is and what this machine has: a launcher's rank or none, GPUs or none. Imports nothing heavy."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_pre.launch.stopping import EVERY_TASK_IS_A_RANK


def visible_gpus() -> int:
    """The number of NVIDIA GPUs this process may use, found without importing torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and (not chosen.strip() or chosen.strip().startswith("-")):
        return 0
    present = len(glob.glob("/dev/nvidia[0-9]*"))
    if not present and os.path.exists("/dev/dxg") and shutil.which("nvidia-smi"):  # Windows Subsystem for Linux
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        present = len(re.findall(r"^GPU \d", listing, re.MULTILINE))
    return min(present, len(chosen.split(","))) if chosen else present


def uses_gpu(platform: str) -> bool:
    """Whether a run with this ``platform`` (auto, cpu, gpu) goes to GPUs here."""
    return platform == "gpu" or (platform == "auto" and visible_gpus() > 0)


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes that a process of this machine can have: its memory, or what the control group of this process, or one
    above it, is limited to (a container's, a Slurm job's).

    Args:
        root: of the file system that the limits are read from.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in _limit_files(root):
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdigit() else []  # "max" otherwise
    return min(limits)


def _limit_files(root: Path) -> Iterator[Path]:
    """Where the memory limits of this process may stand, in both versions of control groups."""
    mounted = root / "sys/fs/cgroup"
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for group in groups:
        _, controllers, path = (group.split(":", 2) + ["", ""])[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, name = (mounted / "memory", "memory.limit_in_bytes") if controllers else (mounted, "memory.max")
        inner = Path(path.lstrip("/"))
        yield from (folder / part / name for part in (inner, *inner.parents))


def prepare_environment(platform: str = "auto", local_ranks: int = 1) -> None:
    """Set what torch, Megatron and the tokenizers read at import, where the user has not set it, and make Megatron
    importable."""
    from nemo_pre.compat import first_use, unified_memory

    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_ranks)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked after its first use
    os.environ.setdefault("PYTHONWARNINGS", "ignore:The pynvml package:FutureWarning")  # torch's own, in every process
    if platform == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    unified_memory.apply()
    first_use.apply()


def external_job(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The variables of the rank this process already is, in torch's names; None if no launcher started it."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        job = {name: environment[name] for name in names if name in environment}
        return {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **job}
    # SLURM_STEP_ID tells a task that srun started from the batch script, which carries the other two as well.
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return None
    if int(tasks) < 2 and EVERY_TASK_IS_A_RANK not in environment:  # an interactive shell
        return None
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    # A requeued job keeps its number; its ranks must not meet those that a former start may have left behind.
    start = int(environment["SLURM_STEP_ID"]) + 101 * int(environment.get("SLURM_RESTART_COUNT", "0"))
    job_number = int(environment.get("SLURM_JOB_ID", "0")) * 7 + start
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(20_000 + job_number % 10_000)),
    }


def first_host(nodes: str) -> str:
    """The first name of Slurm's compressed node list: ``gpu[07-09,12],login`` gives ``gpu07``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None, nodes
    return match[1] + (match[2] or "") + (match[3] or "")


def is_first_rank() -> bool:
    """Whether this process is rank 0, or no rank at all: the one that prints and writes what concerns the job."""
    job = external_job(os.environ)
    return job is None or job["RANK"] == "0"
