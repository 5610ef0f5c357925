"""One writer at a time in a run's folder.

``OUTPUT_DIR/lock.json`` names the process that writes checkpoints and metrics there: its host, its number and start,
its Slurm job. It appears whole or not at all (a link to a finished file, which NFS makes atomically too), and its
owner touches it every ``HEARTBEAT`` seconds. Whoever finds one decides whether its owner lives:

- the same machine: the process is there, and was started when the lock says;
- a Slurm job: it waits or runs, and is not the job that asks, whose former life (before a requeue, or an earlier step
  of the same start) has ended;
- another machine without Slurm: it was touched in the last ``SILENCE`` seconds of the file server's clock.

A dead owner's lock is not removed but followed: ``lock.json.after-TOKEN`` can be linked once for the lock with that
token, so that of two that find the same dead owner one wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nemo_pre.run_files import queue

LOCK = "lock.json"
HEARTBEAT = 30.0  # seconds between two touches
SILENCE = 300.0  # seconds without a touch after which an owner elsewhere, whom nobody can be asked about, is dead
IN_TURN = "NEMO_PRE_VERDICT_FILE"  # is set by the batch script of nemo-pre submit
RUNS = "it runs"  # of a process that can be seen
LOST = 1  # exit code of a process that finds another's lock in the place of its own


@dataclass(frozen=True)
class Owner:
    """Who writes.

    Attributes:
        token: differs between any two locks.
        host, boot, namespace: the machine, its start, and the processes that can be seen from there.
        process, started: number, and clock ticks from the machine's start to the process's; null where there is no
            /proc.
        job, restart, step, site: Slurm's job, how often it was requeued, its step, and the name of the cluster.
        since: when the lock was taken, for people.
    """

    token: str
    host: str
    boot: str
    namespace: str
    process: int
    started: int | None
    job: str | None
    restart: int
    step: str | None
    site: str | None
    since: str

    def __str__(self) -> str:
        where = f"process {self.process} on {self.host}, since {self.since}"
        return f"job {self.job} ({where})" if self.job else where


def this_process() -> Owner:
    """This process as an owner."""
    variables = os.environ
    return Owner(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        boot=_text("/proc/sys/kernel/random/boot_id"),
        namespace=_link("/proc/self/ns/pid"),
        process=os.getpid(),
        started=start_of(os.getpid()),
        job=variables.get("SLURM_JOB_ID"),
        restart=int(variables.get("SLURM_RESTART_COUNT", "0") or 0),
        step=variables.get("SLURM_STEP_ID"),
        site=variables.get("SLURM_CLUSTER_NAME"),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def start_of(process: int) -> int | None:
    """Clock ticks from the machine's start to the process's; None if there is no such process, or it has ended and
    only waits for its parent."""
    stat = _text(f"/proc/{process}/stat")
    after_name = stat.rpartition(")")[2].split()  # the name may hold blanks and parentheses
    if len(after_name) < 20 or after_name[0] in "ZX":
        return None
    return int(after_name[19])


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


# --- does the owner live? -------------------------------------------------------------------------------------------


def signs_of_life(owner: Owner, seen_from: Owner, silent: float) -> str:
    """Why ``owner`` is taken to write still, empty if it does not.

    Args:
        owner: of a lock that was found.
        seen_from: this process.
        silent: seconds since the lock was touched, by the clock of the machine that keeps it.
    """
    if (owner.host, owner.boot, owner.namespace) == (seen_from.host, seen_from.boot, seen_from.namespace):
        if not _has_ended(owner):
            return RUNS
        comes_back = owner.job and owner.job != seen_from.job  # a job that waits in the queue again
        return _asked(queue.state_of, str(owner.job)) if comes_back and queue.has_queue() else ""
    sites = {owner.site, seen_from.site} - {None}  # a login node's shell does not name its cluster
    if owner.job and len(sites) < 2:
        if owner.job == seen_from.job:
            return _life_of_own_job(owner, seen_from, silent)
        if queue.has_queue():
            return _asked(queue.state_of, owner.job)
    return _heartbeat(silent)


def _asked(question: Callable[[str], str], about: str) -> str:
    try:
        return question(about)
    except TimeoutError as error:
        return f"Slurm cannot be asked: {error}"


def _heartbeat(silent: float) -> str:
    return f"last touched {silent:.0f} s ago, and free after {SILENCE:.0f} s" if silent < SILENCE else ""


def _has_ended(owner: Owner) -> bool:
    started = start_of(owner.process)
    if started is not None and owner.started is not None:
        return started != owner.started
    if _text(f"/proc/{owner.process}/stat"):  # it waits for its parent
        return True
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, whom /proc may hide
        pass
    return False


def _life_of_own_job(owner: Owner, seen_from: Owner, silent: float) -> str:
    """Slurm ends all of a start before the next begins; in one start, steps may run side by side."""
    if owner.restart != seen_from.restart:
        return ""
    if owner.step and owner.step == seen_from.step:
        return ""  # started again in place, by what runs in the step
    if IN_TURN in os.environ:
        return ""  # the batch script begins a step when the former has ended
    if owner.step and owner.step.isdigit() and queue.has_queue():
        return _asked(queue.state_of_step, f"{owner.job}.{owner.step}")
    return _heartbeat(silent)


# --- taking and leaving ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder: str | Path, keeps: tuple[int, ...] = ()) -> Iterator[None]:
    """Hold the folder's lock for as long as the block runs.

    Args:
        folder: is made if it is not there.
        keeps: exit codes with which a Slurm job goes on later: the lock stays its own.

    Raises:
        ValueError: another process, or another job, writes there.
    """
    directory, mine = Path(folder), this_process()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        take(directory, mine)
    except OSError as error:
        raise ValueError(f"output_dir={folder} cannot be written to: {error.strerror or error}.") from error
    beating = _Heartbeat(directory, mine)
    beating.start()
    comes_back = False
    try:
        yield
    except SystemExit as end:
        comes_back = mine.job is not None and end.code in keeps
        raise
    finally:
        beating.stop()
        if not comes_back:
            leave(directory, mine)


def take(folder: Path, mine: Owner) -> None:
    """Take the lock.

    Raises:
        ValueError: somebody has it.
    """
    draft = folder / f"{LOCK}.{mine.token}"
    draft.write_text(json.dumps(asdict(mine), indent=1) + "\n")
    try:
        while not _taken(folder, draft, mine):
            pass
    finally:
        draft.unlink(missing_ok=True)


def _taken(folder: Path, draft: Path, mine: Owner) -> bool:
    """Whether the lock was taken; not so if it changed hands meanwhile and is to be looked at again."""
    lock = folder / LOCK
    if _linked(draft, lock):
        return True
    holder = _read(lock)
    if holder is None:
        return False
    owner, place = _last_in_line(folder, holder)
    _refuse_if_alive(folder, owner, place, mine, draft)
    following = folder / f"{LOCK}.after-{owner.token}"
    if not _linked(draft, following):
        return False
    now = _read(lock)
    if now is None or now.token != holder.token:  # the one that followed before us had already moved up
        following.unlink(missing_ok=True)
        return False
    os.replace(draft, lock)
    for old in folder.glob(f"{LOCK}.after-*"):
        old.unlink(missing_ok=True)
    return True


def _last_in_line(folder: Path, owner: Owner) -> tuple[Owner, Path]:
    """The lock's owner, or the last of those that followed a dead one and had not moved up."""
    place = folder / LOCK
    seen = set()
    while owner.token not in seen:
        seen.add(owner.token)
        following = folder / f"{LOCK}.after-{owner.token}"
        found = _read(following)
        if found is None:
            break
        owner, place = found, following
    return owner, place


def _refuse_if_alive(folder: Path, owner: Owner, place: Path, mine: Owner, draft: Path) -> None:
    alive = signs_of_life(owner, mine, _silence(place, draft))
    if alive:
        otherwise = "" if alive == RUNS else f"; if it is certain that it has ended, remove {place}"
        raise ValueError(
            f"output_dir={folder} is being written by {owner} ({alive}): wait for it, end it, or choose another "
            f"output_dir{otherwise}."
        )


def _silence(place: Path, draft: Path) -> float:
    """Seconds since the lock was touched, both times of the machine that keeps the files."""
    try:
        os.utime(draft)
        return draft.stat().st_mtime - place.stat().st_mtime
    except OSError:
        return 0.0


def _linked(draft: Path, target: Path) -> bool:
    """Whether ``target``, which was not there, has become the draft.

    Raises:
        OSError: the file system has neither links nor exclusive creation.
    """
    try:
        os.link(draft, target)
    except FileExistsError:
        return False
    except OSError:
        if os.stat(draft).st_nlink == 2:  # done, and the answer was lost on the way from the server
            return True
        return _created(draft, target)
    return True


def _created(draft: Path, target: Path) -> bool:
    """Create ``target`` exclusively with what the draft holds, on file systems without links."""
    try:
        with target.open("x") as file:
            file.write(draft.read_text())
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> Owner | None:
    """The owner that a file names; None if it is gone.

    Raises:
        ValueError: it is not a lock.
    """
    for _ in range(20):  # where there are no links, it may be seen while it is written
        try:
            values = json.loads(path.read_text())
            return Owner(**{field.name: values[field.name] for field in fields(Owner)})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            time.sleep(0.1)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror}): remove it if nothing writes there."
            ) from error
    raise ValueError(f"{path} names no process: remove it if nothing writes to {path.parent}.")


def leave(folder: Path, mine: Owner) -> None:
    """Give the lock back, if it is still this process's."""
    with contextlib.suppress(ValueError, OSError):
        found = _read(folder / LOCK)
        if found is not None and found.token == mine.token:
            (folder / LOCK).unlink(missing_ok=True)


def refuse_if_written(folder: str | Path) -> None:
    """Refuse a folder whose lock has a living owner, without taking it.

    Raises:
        ValueError: one sentence that names the owner.
    """
    directory = Path(folder)
    holder = _read(directory / LOCK)
    if holder is None:
        return
    owner, place = _last_in_line(directory, holder)
    silent = time.time() - place.stat().st_mtime if place.exists() else SILENCE
    alive = signs_of_life(owner, this_process(), silent)
    if alive:
        raise ValueError(
            f"output_dir={folder} is being written by {owner} ({alive}): wait for it, end it, or choose another "
            f"output_dir."
        )


# --- staying the owner ----------------------------------------------------------------------------------------------


class _Heartbeat(threading.Thread):
    """Touches the lock. A process that finds another's in its place, since it was stopped for longer than ``SILENCE``,
    or somebody removed the file, ends at once: two must not write."""

    def __init__(
        self, folder: Path, mine: Owner, pause: float = HEARTBEAT, end: Callable[[int], object] = os._exit
    ) -> None:
        super().__init__(name="lock of the run's folder", daemon=True)
        self._folder, self._mine, self._pause, self._end = folder, mine, pause, end
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._pause):
            with contextlib.suppress(OSError):  # a server that is away
                self.beat()

    def beat(self) -> None:
        lock = self._folder / LOCK
        try:
            found = _read(lock)
        except ValueError:
            return
        if found is None:
            with contextlib.suppress(ValueError, OSError):
                take(self._folder, self._mine)  # removed by hand, while this process lives
                return
            found = _read(lock)
        if found is None or found.token == self._mine.token:
            os.utime(lock)
        elif not self._stopped.is_set():
            print(
                f"nemo-pre: {self._folder} was taken over by {found}, since this process gave no sign of life for "
                f"{SILENCE:.0f} s: it ends.",
                file=sys.stderr,
                flush=True,
            )
            self._end(LOST)

    def stop(self) -> None:
        self._stopped.set()
        self.join(timeout=5.0)
