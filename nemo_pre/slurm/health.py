"""Is this node fit for training? Run once per node, before the ranks: GPUs, their memory's errors, disk, clock.

    srun --ntasks-per-node=1 python -m nemo_pre.slurm.health DIR GPUS MIN_FREE_GB MIN_WRITE_MB_S

Prints ``NODE is well`` or ``NODE is bad: REASON``, or ``no room: REASON``, for which no node is to blame. Uses the
standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

PROBE_MB = 64
MAX_SKEW = 30.0  # seconds


def main(directory: str, gpus: str, min_free_gb: str, min_write_mb_s: str) -> int:
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    too_little = room_problem(Path(directory), float(min_free_gb))
    if too_little:
        print(f"no room: {too_little}", flush=True)
        return 1
    problem = gpu_problem(int(gpus)) or disk_problem(Path(directory), node, float(min_write_mb_s))
    print(f"{node} is bad: {problem}" if problem else f"{node} is well", flush=True)
    return 1 if problem else 0


def gpu_problem(expected: int) -> str | None:
    """What is wrong with the GPUs, of which there should be ``expected``."""
    if expected == 0:
        return None
    try:
        names = _nvidia_smi("index")
        errors = _nvidia_smi("ecc.errors.uncorrected.volatile.total")
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi fails ({type(error).__name__})"
    if len(names) < expected:
        return f"{len(names)} of {expected} GPUs"
    faulty = [index for index, count in zip(names, errors, strict=False) if count.isdigit() and int(count) > 0]
    return f"uncorrected memory errors on GPU {', '.join(faulty)}" if faulty else None


def _nvidia_smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [line.strip() for line in output.splitlines() if line.strip()]


def room_problem(directory: Path, min_free_gb: float) -> str | None:
    """Whether there is too little room on the run's disk; of one that cannot be reached nothing is known."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free / 1e9
    except OSError:
        return None
    return f"{free:.1f} GB free in {directory}, {min_free_gb:g} wanted" if free < min_free_gb else None


def disk_problem(directory: Path, node: str, min_write_mb_s: float) -> str | None:
    """What is wrong with the run's disk as this node sees it, and with the node's clock beside the disk's."""
    probe = directory / f".health-{node}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        speed = _write(probe)
        skew = abs(time.time() - probe.stat().st_mtime)
    except OSError as error:
        return f"cannot write to {directory} ({error.strerror})"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    if speed < min_write_mb_s:
        return f"writes {speed:.1f} MB/s to {directory}, {min_write_mb_s:g} wanted"
    return f"its clock is {skew:.0f} s away from the disk's" if skew > MAX_SKEW else None


def _write(path: Path) -> float:
    """Speed of writing in MB/s, as far as the disk and not into memory."""
    block = os.urandom(1 << 20)
    begin = time.monotonic()
    with path.open("wb") as file:
        for _ in range(PROBE_MB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return PROBE_MB * 1.048576 / (time.monotonic() - begin)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
