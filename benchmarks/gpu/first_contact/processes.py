"""Processes that are watched and ended with all that they started, whatever session that put itself into."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
PAGE = os.sysconf("SC_PAGE_SIZE")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends: so none of them can hide."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def family(of: int, but: Collection[int] = ()) -> list[int]:
    """The process and its descendants, without those named in ``but`` and theirs."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name, in parentheses, may hold anything.
            parent = int(Path(entry.path, "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            children[parent].append(int(entry.name))
    found, to_look_at = [], [of]
    while to_look_at:
        process = to_look_at.pop()
        if process not in but:
            found.append(process)
            to_look_at += children[process]
    return found


def memory_of(processes: Collection[int]) -> int:
    """Bytes of memory that are the processes' own (without files that are mapped)."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{process}/statm").read_text().split()
            total += (int(fields[1]) - int(fields[2])) * PAGE
    return total


def kill(processes: Collection[int]) -> None:
    """Kill them, and reap those that are this process's children."""
    for process in processes:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    patience = time.monotonic() + 5  # one that waits in a driver cannot be killed, and is not waited for
    left = set(processes)
    while left and time.monotonic() < patience:
        for process in list(left):
            try:
                ended, _ = os.waitpid(process, os.WNOHANG)
            except ChildProcessError:  # another's child, or reaped
                ended = process
            if ended:
                left.discard(process)
        if left:
            time.sleep(0.02)


def first_to_go() -> None:
    """Be the process that the system ends first when memory is short, before the one that watches."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
