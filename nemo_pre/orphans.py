"""No helper process outlives the rank that started it.

The writers of a checkpoint, the server they report to, and a loader's workers hold a rank's memory and its output.
Where no cgroup ends them with it, a rank that is killed would leave them behind, and Slurm waits for a minute for all
that hold a task's output. Linux only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have this process, a child of ``parent``, killed when that ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def forked_processes_die_with_their_parent() -> None:
    """Have every process that this one and its children fork killed when its parent ends. Linux means the thread that
    forked: it must not end earlier."""
    parent = os.getpid()

    def remember() -> None:
        nonlocal parent
        parent = os.getpid()

    os.register_at_fork(before=remember, after_in_child=lambda: die_with(parent))


def end_with_the_pool() -> None:
    """Have this worker process of a pool end when the process that has the pool does, however that ends: nobody is
    left to take the results. Ctrl-C ends the worker without a traceback."""
    _follow_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_with_the_loader(worker: int) -> None:
    """Have this worker process of a data loader end when the process that has the loader does (``worker_init_fn``).

    Torch's own watch is for another process id of the parent: where a server forks the workers, as in a rank that was
    forked by one, the server stays, and with it workers that wait for a killed rank's next request for ever.
    """
    _follow_parent()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
