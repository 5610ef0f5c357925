"""What the checksums of a checkpoint cost: while it is written, and before it is read.

    python -m benchmarks.checkpoint_checksums                # 1 GiB in tensors of 32 MiB, in the temporary folder

Sides, in turns, medians over rounds:

- ``xxh3_64`` and, for comparison, ``crc32`` (zlib) and ``sha256``: the checksum of bytes in memory;
- ``written plain`` and ``written with checksums``: torch's writer of distributed checkpoints, one process, to the disk
  (``fsync``) and to memory (``/dev/shm``), where nothing else takes time;
- ``inspected``: every byte read again and compared, out of the page cache, by the threads of one process;
- ``loaded``: torch reads every tensor, which is what follows.

Times of a process (``cpu``) are given beside those of the clock, since a machine may be busy with something else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TENSOR = 32 << 20  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a checkpoint's checksums.")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sides: dict[str, list[tuple[float, float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="checksums_") as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        for _ in range(arguments.rounds):
            for name, side in all_sides(arguments.mib << 20, Path(disk), Path(memory)):
                sides.setdefault(name, []).append(timed(side))
    gib = arguments.mib / 1024
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor() or platform.machine()},
        "gib": gib,
        "rounds": arguments.rounds,
        "gib_per_second": {
            name: {
                "clock": round(gib / statistics.median(wall for wall, _ in times), 3),
                "cpu": round(gib / statistics.median(cpu for _, cpu in times), 3),
            }
            for name, times in sides.items()
        },
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "checkpoint_checksums_cpu.json").write_text(json.dumps(result, indent=1) + "\n")


def timed(side: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock, and of the process in all its threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    side()
    return time.perf_counter() - wall, max(time.process_time() - cpu, 1e-9)


def all_sides(size: int, disk: Path, memory: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Each side with its name, in the order in which they run: what is read was written just before."""
    import torch
    import xxhash

    torch.manual_seed(0)
    tensors = {f"module.part_{n}": torch.randint(0, 256, (TENSOR,), dtype=torch.uint8) for n in range(size // TENSOR)}
    content = [memoryview(tensor.numpy()) for tensor in tensors.values()]
    found: list[tuple[str, Callable[[], Any]]] = [
        ("xxh3_64", lambda: [xxhash.xxh3_64_intdigest(part) for part in content]),
        ("crc32", lambda: [zlib.crc32(part) for part in content]),
        ("sha256", lambda: [hashlib.sha256(part).digest() for part in content]),
    ]
    for place, folder in (("disk", disk), ("memory", memory)):
        found += [
            (f"written plain, {place}", lambda folder=folder: write(tensors, folder, False)),
            (f"written with checksums, {place}", lambda folder=folder: write(tensors, folder, True)),
            (f"inspected, {place}", lambda folder=folder: inspect_all(folder)),
            (f"loaded, {place}", lambda folder=folder: load(tensors, folder)),
        ]
    return found


def write(tensors: dict[str, Any], folder: Path, checksums: bool) -> None:
    from torch.distributed.checkpoint import FileSystemWriter, save

    from nemo_pre.checkpoint_files.metadata import FORMAT
    from nemo_pre.compat.checkpoints import checksums_of_torchs_writer

    weights = folder / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    weights.mkdir()
    checksums_of_torchs_writer.apply() if checksums else checksums_of_torchs_writer.revert()
    save(tensors, storage_writer=FileSystemWriter(weights, thread_count=1), no_dist=True)
    checksums_of_torchs_writer.revert()
    import torch

    torch.save({}, weights / "common.pt")
    (weights / "metadata.json").write_text(json.dumps(FORMAT))


def inspect_all(folder: Path) -> None:
    from nemo_pre.checkpoint_files.checksums import stored_checksum
    from nemo_pre.checkpoint_files.inspection import inspect
    from nemo_pre.checkpoint_files.metadata import read_metadata

    found = inspect(folder)
    assert not found.damage and not found.danger, found
    parts = read_metadata(folder / "weights").storage_data.values()
    assert all(stored_checksum(part) is not None for part in parts)


def load(tensors: dict[str, Any], folder: Path) -> None:
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint import load as load_into

    target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    load_into(target, storage_reader=FileSystemReader(folder / "weights"), no_dist=True)


if __name__ == "__main__":
    main()
