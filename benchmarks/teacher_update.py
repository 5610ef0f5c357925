"""How fast LaVer's teacher moves, against a plain copy of the same vector in the same run.

    python -m benchmarks.teacher_update                     # on what the machine has
    python -m benchmarks.teacher_update --parameters 2e8

The update reads the student and the float32 average and writes the average: 12 bytes per parameter (10 from a bf16
student); a copy reads and writes 4. Both take turns; the figure is the ratio of their bandwidths, by medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# A decoder layer's matrices at Qwen2.5-7B's width, in proportion
SHAPES = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (3584,), (3584,))


def main() -> None:
    import torch
    import torch.distributed as dist

    parser = argparse.ArgumentParser(description="Bandwidth of the teacher's update against a copy.")
    parser.add_argument("--parameters", type=float, default=1e8)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "parameters": int(arguments.parameters),
        "students": {
            str(dtype).removeprefix("torch."): measure(dtype, device, arguments.parameters, arguments.rounds)
            for dtype in (torch.float32, torch.bfloat16)
        },
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"teacher_update_{device.type}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["students"], indent=1))
    print(f"written to {out}")
    dist.destroy_process_group()


def measure(dtype: Any, device: Any, parameters: float, rounds: int) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    from nemo_pre.parallel.sharded_average import ShardedAverage, move_averages

    scale = (parameters / sum(torch.Size(shape).numel() for shape in SHAPES)) ** 0.5
    student = [
        torch.randn([max(1, round(size * scale)) for size in shape], device=device).to(dtype) for shape in SHAPES
    ]
    average = ShardedAverage(student, dist.group.WORLD)
    source, target = torch.randn(average.numel, device=device), torch.empty(average.numel, device=device)
    moved = {"update": 8 + student[0].element_size(), "copy": 8}
    todo: dict[str, Callable[[], Any]] = {
        "update": lambda: move_averages([(average, student)], 0.999),
        "copy": lambda: target.copy_(source),
    }
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for number in range(rounds + 3):
        for name, act in todo.items():
            wait(device)
            start = time.perf_counter()
            act()
            wait(device)
            if number >= 3:
                seconds[name].append(time.perf_counter() - start)
    bandwidth = {name: moved[name] * average.numel / statistics.median(times) / 1e9 for name, times in seconds.items()}
    ratios = [
        moved["update"] / update / (moved["copy"] / copy)
        for update, copy in zip(seconds["update"], seconds["copy"], strict=True)
    ]
    return {
        "update_gb_per_s": round(bandwidth["update"], 2),
        "copy_gb_per_s": round(bandwidth["copy"], 2),
        "ratio": round(statistics.median(ratios), 3),
        "update_ms_median": round(1000 * statistics.median(seconds["update"]), 2),
    }


def wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
