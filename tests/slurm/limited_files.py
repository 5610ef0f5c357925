"""The rank's side of test_full_disk: a run in which no file may become larger than so many bytes."""

from __future__ import annotations

import resource
from pathlib import Path

from nemo_pre.config.run import RunConfig

LIMIT = "largest_file"  # in the run's directory


def run_rank(config: RunConfig) -> None:
    from nemo_pre.train import run_rank

    limit = Path(config.output_dir) / LIMIT
    if limit.exists():
        number = int(limit.read_text())
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    run_rank(config)
