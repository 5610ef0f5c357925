"""Do the ranks reach each other? Every task of the job sums numbers with those of its node, then with all.

    srun python -m nemo_pre.slurm.all_reduce SECONDS

The first task of a node prints ``NODE adds up``, the first of the job ``all add up``. Over NCCL where there are GPUs,
over gloo elsewhere. Who misses a partner for ``SECONDS`` ends with an error.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from nemo_pre.launch.environment import external_job

if TYPE_CHECKING:
    from torch.distributed import TCPStore

NUMBERS = 16 * 2**20  # of 4 bytes


def main(seconds: str) -> None:
    import torch
    from torch.distributed import TCPStore

    job = external_job(os.environ)
    assert job is not None, "this is no task of a job"
    rank, local_rank, ranks = (int(job[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    node, index = os.environ.get("SLURMD_NODENAME", socket.gethostname()), int(os.environ["SLURM_NODEID"])
    local_ranks = ranks // int(os.environ["SLURM_JOB_NUM_NODES"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    timeout, port = timedelta(seconds=float(seconds)), int(job["MASTER_PORT"])
    # The node by itself: that another one is missing must not be blamed on it.
    own = TCPStore("127.0.0.1", port + 1 + index, local_ranks, local_rank == 0, timeout)
    sum_over(own, local_rank, local_ranks, timeout)
    if local_rank == 0:
        print(f"{node} adds up", flush=True)
    speed = sum_over(TCPStore(job["MASTER_ADDR"], port, ranks, rank == 0, timeout), rank, ranks, timeout)
    if rank == 0:
        print(f"all add up, at {speed:.2f} GB/s", flush=True)


def sum_over(store: TCPStore, rank: int, ranks: int, timeout: timedelta) -> float:
    """All-reduce among ``ranks`` that find each other in ``store``; returns GB/s of the numbers of one rank.

    Raises:
        RuntimeError: a partner is missing, or the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    numbers = torch.full((NUMBERS,), float(rank + 1), device=device)
    dist.all_reduce(numbers)  # connects
    begin = time.monotonic()
    dist.all_reduce(numbers)
    found = (numbers[0].item(), numbers[-1].item())  # waits for a GPU
    speed = 4e-9 * NUMBERS / (time.monotonic() - begin)
    expected = float(ranks * ranks * (ranks + 1) // 2)
    if found != (expected, expected):
        raise RuntimeError(f"the sum is {found} instead of {expected}")
    dist.destroy_process_group()
    return speed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
