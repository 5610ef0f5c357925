"""Processes that do not outlive the one that started them, however it ends.

Imported by the server that forks CPU ranks, before anything else: it dies with the launcher, whose process
:data:`LAUNCHER` names, and leaves Ctrl-C to it. The server would notice by itself that the launcher is gone, but only
when it has imported NeMo, which takes ten seconds and on a busy machine many more.

As a program it puts another one on the leash: ``python -m nemo_pre.launch.leash PARENT COMMAND ...``.
"""

import os
import signal
import sys
from collections.abc import Sequence

from nemo_pre.orphans import die_with

LAUNCHER = "NEMO_PRE_LAUNCHER"


def leashed(command: Sequence[str]) -> list[str]:
    """The command that runs ``command`` as a process that is killed when this one, or the thread that starts it,
    ends."""
    return [sys.executable, "-m", "nemo_pre.launch.leash", str(os.getpid()), *command]


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
elif LAUNCHER in os.environ:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(int(os.environ[LAUNCHER]))
