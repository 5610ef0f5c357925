"""What Slurm's queue says of a job, asked with ``squeue``."""

from __future__ import annotations

import shutil
import subprocess
import time

ASKED = 3  # times, since a controller that restarts is away for some seconds
PAUSE = 5.0  # seconds between them
ANSWER = 20.0  # seconds that one answer may take
FORGOTTEN = "Invalid job"  # what squeue says of a job, or a step, that ended longer ago than Slurm remembers
ENDED = (  # or ending: Slurm has killed its processes
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("REVOKED", "TIMEOUT"),
)


def has_queue() -> bool:
    """Whether this machine can ask Slurm."""
    return shutil.which("squeue") is not None


def state_of(job: str) -> str:
    """The state of a job, or of a task of an array (``123_4``), that waits or runs; empty when it does neither.

    A job that is preempted or put back into the queue is one that waits.

    Raises:
        TimeoutError: Slurm does not answer.
    """
    states = [state for state in _squeue(f"--jobs={job}", "--format=%T").split() if state not in ENDED]
    return states[0] if states else ""


def state_of_step(step: str) -> str:
    """``RUNNING`` for a step of a job (``123.4``) that runs, or empty.

    Raises:
        TimeoutError: Slurm does not answer.
    """
    return "RUNNING" if _squeue(f"--steps={step}").strip() else ""


def _squeue(*options: str) -> str:
    reason = ""
    for attempt in range(ASKED):
        if attempt:
            time.sleep(PAUSE)
        try:
            answer = subprocess.run(
                ["squeue", "--noheader", *options], capture_output=True, text=True, check=False, timeout=ANSWER
            )
        except subprocess.TimeoutExpired:
            reason = f"no answer in {ANSWER:g} s"
            continue
        if answer.returncode == 0:
            return answer.stdout
        if FORGOTTEN in answer.stderr:
            return ""
        reason = (answer.stderr.strip() or f"exit code {answer.returncode}").splitlines()[-1]
    raise TimeoutError(reason)
