"""``nemo-pre`` in a process that has imported NeMo already: forked, where a user's takes ten seconds to start."""

from __future__ import annotations

import os
import sys
import tempfile

from tests.ranks import run_ranks


def command_line(words: list[str]) -> tuple[int, str]:
    """Exit code and output of ``nemo-pre WORDS``, run as the only rank of a job that a launcher started."""
    ((code, output),) = run_ranks(_command_line, 1, words)
    return code, output


def _command_line(words: list[str]) -> tuple[int, str]:
    from nemo_pre.cli import main

    with tempfile.TemporaryFile("w+") as output:
        os.dup2(output.fileno(), 1)
        sys.stdout = output
        code = main(words)
        output.flush()
        output.seek(0)
        return code, output.read()
