"""What a rank and its batch script tell each other. Imports nothing heavy: signals are heard before NeMo is there.

To the rank: stop at the next step boundary, by SIGUSR1 or SIGTERM, or by a file that appears. The batch script uses
the file, because Slurm sends a signal to every process of a step, and helper processes of asynchronous checkpoints
die of it. From the rank: its exit code, and the verdict in a file.
"""

from __future__ import annotations

import os
import signal
from typing import Any

STOP_FILE = "NEMO_PRE_STOP_FILE"  # names of environment variables
VERDICT_FILE = "NEMO_PRE_VERDICT_FILE"
EVERY_TASK_IS_A_RANK = "NEMO_PRE_EVERY_TASK_IS_A_RANK"

REQUEUE = 85  # exit code of a rank that wrote a checkpoint and can go on
ROLL_BACK = 86  # of one that wants to be started again at once, from the last checkpoint
DO_NOT_RESTART = 2  # exit code of nemo-pre for what the user has to change
VERDICTS = {REQUEUE: "requeue", ROLL_BACK: "roll-back", DO_NOT_RESTART: "do-not-restart"}

_heard = False


def listen() -> None:
    """Remember SIGUSR1 and SIGTERM from now on instead of ending the process; a second one changes nothing."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _hear)


def _hear(number: int, frame: Any) -> None:
    global _heard
    _heard = True


def is_requested(look_for_file: bool) -> bool:
    """Whether this process was told to stop.

    Args:
        look_for_file: also look for the batch script's file; it lies on a shared disk, so one rank does.
    """
    path = os.environ.get(STOP_FILE)
    return _heard or bool(look_for_file and path and os.path.exists(path))
