"""``run_ranks(fn, world_size, *args)``: one function on several ranks of this machine.

Importing NeMo takes ten seconds or more, so the ranks are forked from a server process that has imported it once
(:mod:`tests.ranks.warm`); the process that runs pytest never imports it. A rank that raises, dies or hangs ends the
whole group, and the caller sees that rank's traceback and the end of its output.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
GRACE = 2.0  # seconds the other ranks are given, after the first failure, to report theirs
OUTPUT_TAIL = 4000  # characters of a failed rank's output that the error shows


class RankError(RuntimeError):
    """A rank raised, died or ran out of time; the message holds every failed rank's traceback."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Run ``fn(*args)`` on ``world_size`` ranks and return what each returned, by rank.

    ``fn`` is a module-level function (it travels by name), ``args`` and results travel by pickle. Each rank finds
    the variables torch and Lightning read (``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``,
    ``MASTER_PORT``) and initialises what it needs itself. ``timeout`` is in seconds, for the ranks' work alone: the
    server's first import is not counted.

    Raises:
        RankError: a rank raised, exited without a result, or was still running after ``timeout`` seconds (the
            message then shows where each rank was).
    """
    context = _warm_context()
    job = pickle.dumps((fn, args))
    environment = {
        **(env or {}),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        ranks = [_Rank(context, rank, job, environment, Path(scratch)) for rank in range(world_size)]
        try:
            return _collect(ranks, timeout)
        finally:
            for rank in ranks:
                rank.kill()


class _Rank:
    """One rank's process, the pipe its result comes through, and the file its output goes to."""

    def __init__(self, context: Any, rank: int, job: bytes, environment: dict[str, str], scratch: Path) -> None:
        self.rank = rank
        self.output = scratch / f"rank{rank}.log"
        self.receiver, sender = context.Pipe(duplex=False)
        variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        self.process = context.Process(target=_rank_main, args=(sender, job, variables, str(self.output)))
        self.process.start()
        sender.close()

    def read(self) -> tuple[bool, Any] | None:
        """``(True, result)``, ``(False, traceback)``, or None while the rank has said nothing and lives."""
        try:
            if self.receiver.poll():
                return pickle.loads(self.receiver.recv_bytes())
        except EOFError:
            self.process.join(GRACE)
            return False, f"exited with code {self.process.exitcode} and without a result"
        return None

    def tail(self) -> str:
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        lines = [line for line in text.splitlines() if not line.startswith("[Gloo] Rank")]  # one per group and rank
        return "\n".join(lines)[-OUTPUT_TAIL:]

    def kill(self) -> None:
        """End the rank and whatever it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # the rank leads its own process group
        except ProcessLookupError:
            self.process.kill()
        self.process.join()
        self.receiver.close()


def _collect(ranks: list[_Rank], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(results) + len(failures) < len(ranks):
        waiting = [r for r in ranks if r.rank not in results and r.rank not in failures]
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            if not failures:
                failures = _where_they_hang(waiting, timeout)
            break
        multiprocessing.connection.wait([r.receiver for r in waiting], remaining)
        for rank in waiting:
            answer = rank.read()
            if answer is None:
                continue
            if answer[0]:
                results[rank.rank] = answer[1]
            else:
                if not failures:  # the others may fail because of this one: hear them, but do not wait for long
                    deadline = min(deadline, time.monotonic() + GRACE)
                failures[rank.rank] = answer[1]
    if failures:
        parts = [
            f"rank {r.rank} of {len(ranks)}: {failures[r.rank]}\n--- end of its output ---\n{r.tail()}"
            for r in ranks
            if r.rank in failures
        ]
        raise RankError("\n".join(parts))
    return [results[r.rank] for r in ranks]


def _where_they_hang(ranks: list[_Rank], timeout: float) -> dict[int, str]:
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGUSR1)  # faulthandler writes every thread's stack to the rank's output
    time.sleep(0.5)
    return {rank.rank: f"still running after {timeout:g} s" for rank in ranks}


def _warm_context() -> Any:
    """The fork server's context; the first call starts the server, whose import the call does not wait for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks.warm"])
    # Before 3.12 the server does not take over sys.path and skips, without a word, what it cannot import.
    paths = [str(REPOSITORY), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    server_environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # byte code halves NeMo's import
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",  # gloo ranks are CPU ranks, also on a machine that has a GPU
    }
    before = {name: os.environ.get(name) for name in server_environment}
    os.environ.update(server_environment)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    return context


def _rank_main(sender: Any, job: bytes, variables: dict[str, str], output: str) -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the server
    log = open(output, "w", buffering=1)  # noqa: SIM115 - for the life of the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)
    os.environ.update(variables)
    try:
        import torch

        torch.set_num_threads(1)
        fn, args = pickle.loads(job)
        answer = pickle.dumps((True, fn(*args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    sender.close()
    log.flush()
    # gloo's and Megatron's threads may wait for ranks that are gone: nothing of this process is needed any more.
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
