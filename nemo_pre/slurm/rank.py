"""One task of a Slurm job: ``nemo-pre train``, which listens for signals from its first moment on and leaves its
verdict in a file. The file counts and not srun's exit code, which is the highest of all tasks': those that srun ends
because one has ended give 137.

    srun python -m nemo_pre.slurm.rank experiment=NAME ...
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence

from nemo_pre.launch import stopping
from nemo_pre.orphans import forked_processes_die_with_their_parent

IN_PLACE = "FT_LAUNCHER_IPC_SOCKET"  # is there where ft_launcher started this rank, and starts it again if it fails


def main(words: Sequence[str]) -> int:
    if os.path.exists(os.environ.get(stopping.VERDICT_FILE, "")):
        return 0  # started again by ft_launcher, although the batch script is to decide
    stopping.listen()
    forked_processes_die_with_their_parent()
    os.environ[stopping.EVERY_TASK_IS_A_RANK] = "1"
    from nemo_pre import cli

    try:
        code = cli.main(["train", *words])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # of which some are no Exception, such as torch's CheckpointException
        traceback.print_exc()
        code = 1
    if code in stopping.VERDICTS and not (code == stopping.ROLL_BACK and IN_PLACE in os.environ):
        leave_verdict(stopping.VERDICTS[code])
    return code


def leave_verdict(verdict: str) -> None:
    """The first rank's counts: what the others say later may only follow from it."""
    path = os.environ.get(stopping.VERDICT_FILE)
    if path:
        with contextlib.suppress(FileExistsError), open(path, "x") as file:
            file.write(verdict)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()  # Slurm waits for all that hold the task's output
    os._exit(code)  # at once: threads of gloo, NCCL and Megatron may wait for ranks that have ended
