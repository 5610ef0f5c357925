"""The allocator's peak beside the plan's and the rehearsal's; the teacher's update beside a copy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.first_contact.record import Record
from benchmarks.gpu.first_contact.runs import free_port, in_processes

REHEARSED = Path(__file__).with_name("rehearsed_memory.json")  # python -m benchmarks.gpu.first_contact.rehearsed
CASES = (2, 6)  # of benchmarks.planned_memory: PRe, and LaVer with mixed attention
OF_PLAN, OF_REHEARSAL = 0.05, 0.05
OF_A_COPY = 0.8


def peaks(record: Record) -> None:
    """Two runs at once, each in a process of its own; before that, that their rehearsals are of these runs."""
    from benchmarks.planned_memory import describe, run_case
    from nemo_pre.rehearsal.record import digest

    rehearsed = json.loads(REHEARSED.read_text())
    for case in CASES:
        config, planned = planned_case(case)
        entry = rehearsed.get(describe(case), {})
        same = entry.get("digest") == digest(config)
        record.check(f"case {case}: rehearsed", "this run" if same else "another run", "this run", same)
        if same:
            over = planned / entry["peak"] - 1
            record.between(f"case {case}: plan over the rehearsal", over, 0.0, 0.03, describe(case))
    record.only_with_a_gpu("torch.cuda.max_memory_allocated")
    for case, found in zip(CASES, in_processes(run_case, [(case,) for case in CASES]), strict=True):
        if found is None:
            record.check(f"case {case}", "its process ended without a result", "a peak", False)
            continue
        measured = found["measured_bytes"]
        record.fact(f"case {case}", {**found, "rehearsed_bytes": rehearsed.get(describe(case), {}).get("peak")})
        record.near(
            f"case {case}: plan over measured", found["planned_bytes"] / measured, 1.0, OF_PLAN, describe(case)
        )
        if describe(case) in rehearsed:
            part = rehearsed[describe(case)]["peak"] / measured
            record.near(f"case {case}: rehearsal over measured", part, 1.0, OF_REHEARSAL)


def planned_case(case: int) -> tuple[Any, int]:
    """The run of one of ``benchmarks.planned_memory``'s cases, and its planned peak without the libraries' own."""
    from benchmarks.planned_memory import planned_case as run_and_plan

    config, planned = run_and_plan(case, "unused")
    return config, planned.total - planned.by_kind.get("libraries", 0)


def teacher(record: Record) -> None:
    """Bandwidths of the update and of a copy, in turns, for a float32 and a bf16 student."""
    import torch
    import torch.distributed as dist

    from benchmarks.teacher_update import measure

    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    device = torch.device("cpu" if record.on_cpu else "cuda")
    dist.init_process_group("gloo" if record.on_cpu else "nccl")
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        with record.part(name):
            record.at_most(f"{name} student: the average beside float64's", _wrong_by(dtype, device), 1e-6)
            speeds[name] = measure(dtype, device, 2e6 if record.on_cpu else 4e8, 5 if record.on_cpu else 15)
            record.fact(f"{name} student", speeds[name])
    dist.destroy_process_group()
    record.only_with_a_gpu("the bandwidth of its memory")
    for name, found in speeds.items():
        record.between(f"{name} student: update's bandwidth of a copy's", found["ratio"], OF_A_COPY, 1.6)


def _wrong_by(dtype: Any, device: Any) -> float:
    """How far an average that has moved is from where float64 puts it, over how far it has moved."""
    import torch
    import torch.distributed as dist

    from nemo_pre.parallel.sharded_average import ShardedAverage, move_averages

    start, now = (torch.randn(1023, 65, device=device).to(dtype) for _ in range(2))
    average = ShardedAverage([start], dist.group.WORLD)
    move_averages([(average, [now])], 0.9)
    found = average.split(average.gather(torch.float32))[0].double().view_as(start)
    expected = 0.9 * start.double() + 0.1 * now.double()
    return float((found - expected).norm() / (expected - start.double()).norm())
