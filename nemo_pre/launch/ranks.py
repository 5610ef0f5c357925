"""The one way a run's ranks are started and watched.

A process that a launcher already started as a rank (torchrun, srun) runs in place. Otherwise the layout's ranks are
started on this machine, forked from a server process that imported NeMo once, and watched: when one dies, the
others get ``GRACE`` seconds to report their own error, then are ended, and the caller gets one sentence that says
which rank died of what, within ``GRACE + TERM_WAIT`` seconds and a little.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nemo_pre.compat.versions import check_nemo
from nemo_pre.launch.environment import external_job, prepare_environment, uses_gpu
from nemo_pre.launch.failures import RankFailure, os_sentence
from nemo_pre.launch.gpu_settings import set_gpu_environment
from nemo_pre.launch.leash import LAUNCHER
from nemo_pre.launch.stopping import ROLL_BACK
from nemo_pre.launch.words import LIBRARIES, VERBOSE, is_verbose, separate_words, speak_on
from nemo_pre.orphans import forked_processes_die_with_their_parent

if TYPE_CHECKING:
    from nemo_pre.config.run import RunConfig

WITH_NEMO = "nemo_pre.launch.preload"  # what ranks of NeMo's find already imported
LEASH = "nemo_pre.launch.leash"
GRACE = 5.0  # seconds the survivors of a dead rank may go on
TERM_WAIT = 3.0  # seconds between asking them to end and killing them; Ctrl-C ends a run within five
SUDDEN = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)  # never another rank's doing
MESSAGE_LIMIT, TRACEBACK_LIMIT = 2_000, 20_000  # characters a rank reports; a pipe holds them without a reader


def launch(config: RunConfig, entry: str, preload: str | None = WITH_NEMO, own_words: bool = False) -> None:
    """Run ``entry`` (``"module:function"``, called with ``config``) on every rank of the run's layout.

    ``preload`` names the module that CPU ranks find already imported, and others import first. Ranks other than 0
    that are started here write their output to ``output_dir/rank<N>.log``; the log of a start before it is kept as
    ``rank<N>.former.log``. With ``own_words`` what libraries say on rank 0 goes to such a file too
    (:mod:`nemo_pre.launch.words`), unless ``--verbose`` wants it seen.

    Raises:
        RankFailure: a rank raised, or was ended by a signal.
        ValueError: the launcher's job and the layout disagree, several nodes are asked for without a launcher, or the
            entry needs NeMo and there is none.
    """
    from nemo_pre.config.derived import world_size

    if preload == WITH_NEMO:
        check_nemo()

    ranks = world_size(config.parallel)
    job = external_job(os.environ)
    if job is not None:
        if int(job["WORLD_SIZE"]) != ranks:
            raise ValueError(
                f"The layout needs {ranks} ranks but the launcher started {job['WORLD_SIZE']}: "
                f"change parallel or the number of tasks."
            )
        os.environ.update(job)
        prepare_environment(config.platform, ranks // config.cluster.nodes)
        if uses_gpu(config.platform):
            set_gpu_environment(config.parallel)
        if preload:
            importlib.import_module(preload)  # without the libraries' warnings, times the number of ranks
        if own_words:
            _use_own_words(Path(config.output_dir) / LIBRARIES, started_here=False)
        _resolve(entry)(config)
        return
    if config.cluster.nodes > 1:
        raise ValueError(
            f"cluster.nodes={config.cluster.nodes} needs a launcher that starts the ranks on every node, "
            f"such as srun or torchrun."
        )
    prepare_environment(config.platform, ranks)
    if uses_gpu(config.platform):
        set_gpu_environment(config.parallel)
    if ranks > 1 or not uses_gpu(config.platform):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("forkserver")
    # A process that forks must not have touched CUDA, which importing NeMo may do: GPU ranks import for themselves.
    imported = [preload] if preload and not uses_gpu(config.platform) else []
    context.set_forkserver_preload([LEASH, *imported])
    with _sigterm_interrupts(), _named_as_launcher():
        while not _run_local_ranks(context, config, entry, ranks, preload if own_words else None):
            pass  # they ask to be started again


# --- local ranks ----------------------------------------------------------------------------------------------------


class _Rank:
    """One rank's process, and the pipe through which it reports an exception."""

    def __init__(
        self, context: Any, config: RunConfig, entry: str, variables: dict[str, str], libraries: str | None
    ) -> None:
        self.number = int(variables["RANK"])
        has_log = self.number or (libraries and not is_verbose())
        self.log = Path(config.output_dir) / f"rank{self.number}.log" if has_log else None
        if self.log is not None and self.log.exists():
            self.log.replace(self.log.with_suffix(".former.log"))
        self._reports, sender = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_rank_main, args=(entry, config, variables, self.log, sender, libraries), name=f"rank {self.number}"
        )
        self.process.start()
        sender.close()

    def failure(self, ranks: int) -> RankFailure:
        """Why the rank ended, of which it is known that its exit code is not 0."""
        code = self.process.exitcode
        where = f"; its output is in {self.log}" if self.log else ""
        with contextlib.suppress(EOFError):
            if self._reports.poll():
                error, trace, explained = self._reports.recv()
                return RankFailure(f"Rank {self.number} of {ranks} ended with {error}{where}.", trace, explained)
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            how += " (out of memory?)" if -code == signal.SIGKILL else ""
        else:
            how = f"exited with code {code}"
        return RankFailure(f"Rank {self.number} of {ranks} {how}{where}.")


def _run_local_ranks(context: Any, config: RunConfig, entry: str, count: int, libraries: str | None) -> bool:
    """Whether the ranks came to their end; if not, they rolled back and want to go on from there. ``libraries`` names
    the module that imports those whose words rank 0 keeps apart."""
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {VERBOSE: os.environ.get(VERBOSE, "")}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks: list[_Rank] = []
    try:
        for number in range(count):
            place = {**shared, "RANK": str(number), "LOCAL_RANK": str(number)}
            ranks.append(_Rank(context, config, entry, place, libraries))
        return _watch(ranks)
    finally:
        _end(ranks)


def _watch(ranks: list[_Rank]) -> bool:
    """Wait for every rank; when one fails, give the others their time and raise for the one that is the cause. False
    when they ask to be started again."""
    failed: list[_Rank] = []
    deadline: float | None = None
    running = list(ranks)
    while running and (deadline is None or time.monotonic() < deadline):
        timeout = None if deadline is None else deadline - time.monotonic()
        multiprocessing.connection.wait([rank.process.sentinel for rank in running], timeout)
        ended = [rank for rank in running if rank.process.exitcode is not None]
        running = [rank for rank in running if rank not in ended]
        failed += [rank for rank in ended if rank.process.exitcode != 0]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE
    if any(rank.process.exitcode == ROLL_BACK for rank in failed):
        return False
    if failed:
        # A rank that lost its connection to a killed one may be heard of first, but is not the cause.
        cause = next((rank for rank in failed if -rank.process.exitcode in SUDDEN), failed[0])
        raise cause.failure(len(ranks))
    return True


def _end(ranks: list[_Rank]) -> None:
    """No rank is left behind."""
    alive = [rank.process for rank in ranks if rank.process.is_alive()]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + TERM_WAIT
    for process in alive:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _rank_main(
    entry: str, config: RunConfig, variables: dict[str, str], log: Path | None, reports: Any, libraries: str | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which ends the ranks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.pop(LAUNCHER, None)  # of what this rank may launch itself
    threading.Thread(target=_die_with_launcher, args=(reports,), daemon=True).start()
    forked_processes_die_with_their_parent()
    os.environ.update(variables)
    if log is not None and variables["RANK"] != "0":
        _write_output_to(log)
    try:
        if libraries and variables["RANK"] == "0":
            importlib.import_module(libraries)
            _use_own_words(log, started_here=True)
        if "torch" in sys.modules:  # imported by the server, before this rank's environment was known
            sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        _resolve(entry)(config)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == ROLL_BACK:
            _leave(ROLL_BACK)
        trace = traceback.format_exc()
        if log is not None:
            print(trace, file=sys.stderr)
        known = os_sentence(error)
        sentence = f"{type(error).__name__}: {known or str(error).strip() or 'no message'}".rstrip(".")
        explained = known is not None or isinstance(error, ValueError)
        reports.send((sentence[:MESSAGE_LIMIT], trace[-TRACEBACK_LIMIT:], explained))
        _leave(1)


def _use_own_words(log: Path | None, started_here: bool) -> None:
    if log is None or is_verbose():
        speak_on(sys.stderr)
    else:
        separate_words(log, started_here)


def _leave(code: int) -> NoReturn:
    """End at once: threads of gloo and Megatron may wait for ranks that will never answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_with_launcher(reports: Any) -> None:
    """No rank outlives the launcher: it alone holds the pipe's other end, and the kernel tells when that closes."""
    poll = select.poll()
    poll.register(reports.fileno(), 0)  # errors only
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


def _write_output_to(log: Path) -> None:
    file = log.open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file


@contextlib.contextmanager
def _named_as_launcher() -> Iterator[None]:
    """The server that is started meanwhile dies with this process. Linux means the thread that started it, so that one
    which may end earlier names nobody."""
    if threading.current_thread() is threading.main_thread():
        os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(LAUNCHER, None)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the ranks as Ctrl-C does; handlers can only be set in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _resolve(entry: str) -> Any:
    module, _, function = entry.partition(":")
    return getattr(importlib.import_module(module), function)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
