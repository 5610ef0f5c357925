"""One function on several ranks of this machine: :func:`run_ranks`, and :class:`Ranks` that take job after job.

Importing NeMo takes ten seconds or more, so the ranks are forked from a server process that has imported it once
(:mod:`tests.ranks.warm`); the process that runs pytest never imports it. A rank that raises, dies or hangs ends the
whole group, and the caller sees that rank's traceback and the end of its output.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
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
# Of former jobs: gloo's, where something still refers to a group, as after a run with the distributed optimizer. More
# would take time from the next.
LEFT_THREADS = 24
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
    with Ranks(world_size, env) as ranks:
        return ranks.run(fn, *args, timeout=timeout)


class Ranks:
    """``world_size`` processes that run one function after another, each as if it were the first.

    Between two jobs the ranks forget what the former left (:mod:`tests.ranks.reset`), process groups included; a job
    initialises what it needs itself, as in :func:`run_ranks`. After a failed job, and when former jobs have left too
    many threads, the ranks are gone: :attr:`alive` is False, and other ranks must take the next one.
    """

    def __init__(self, world_size: int, env: dict[str, str] | None = None) -> None:
        context = _warm_context()
        environment = {
            **(env or {}),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
        }
        self.alive = True
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks-")
        self._ranks = [_Rank(context, rank, environment, Path(self._scratch.name)) for rank in range(world_size)]

    def __len__(self) -> int:
        return len(self._ranks)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """What each rank returned from ``fn(*args)``, by rank: see :func:`run_ranks`."""
        # Its own port: the former job's store may still hold the other.
        job = pickle.dumps((str(_free_port()), fn, args))
        keep = False
        try:
            for rank in self._ranks:
                rank.send(job)
            answers = _collect(self._ranks, timeout)
            keep = all(threads <= LEFT_THREADS for _, threads in answers)
            return [result for result, _ in answers]
        finally:  # also where the test is interrupted: the ranks may be anywhere in the job
            if not keep:
                self.close()

    def close(self) -> None:
        """End the ranks and whatever they started."""
        self.alive = False
        for rank in self._ranks:
            rank.kill()
        self._scratch.cleanup()


class _Rank:
    """One rank's process, the pipe its jobs and results go through, and the file its output goes to."""

    def __init__(self, context: Any, rank: int, environment: dict[str, str], scratch: Path) -> None:
        self.rank = rank
        self.output = scratch / f"rank{rank}.log"
        self.connection, theirs = context.Pipe()
        variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        self.process = context.Process(target=_rank_main, args=(theirs, variables, str(self.output)))
        self.process.start()
        theirs.close()

    def send(self, job: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead rank is found when it is read
            self.connection.send_bytes(job)

    def read(self) -> tuple[bool, Any] | None:
        """``(True, (result, left threads))``, ``(False, traceback)``, or None while it lives and is silent."""
        try:
            if self.connection.poll():
                return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):  # at the end of a message, or within one
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
        self.connection.close()


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
        multiprocessing.connection.wait([r.connection for r in waiting], remaining)
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


def _rank_main(connection: Any, variables: dict[str, str], output: str) -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the server
    log = open(output, "w", buffering=1)  # noqa: SIM115 - for the life of the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)
    os.environ.update(variables)

    import torch

    torch.set_num_threads(1)
    try:
        _take_jobs(connection, log)
    except (EOFError, BrokenPipeError):  # the tests are over
        pass
    finally:
        # gloo's and Megatron's threads may wait for ranks that are gone: nothing of this process is needed any more.
        os._exit(0)


def _take_jobs(connection: Any, log: Any) -> None:
    from tests.ranks.reset import Beginning

    beginning = None
    while True:
        job = connection.recv_bytes()
        os.ftruncate(log.fileno(), 0)  # one file position for all three: what is shown is this job's output
        os.lseek(log.fileno(), 0, os.SEEK_SET)
        try:
            if beginning is None:
                beginning = Beginning.of_this_process()
            else:
                beginning.restore()  # not before every rank has finished the former job
            left = len(os.listdir("/proc/self/task")) - 1
            os.environ["MASTER_PORT"], fn, args = pickle.loads(job)
            answer = pickle.dumps((True, (fn(*args), left)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        log.flush()
        connection.send_bytes(answer)


def _free_port() -> int:
    """A port that nobody is given by chance: below those of connections that name none, of which gloo's ranks make
    hundreds, and with a start of its own in every process of the tests."""
    for port in _PORTS:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the ports are endless")


_PORTS = (20_000 + (os.getpid() * 101 + number) % 12_000 for number in itertools.count())
