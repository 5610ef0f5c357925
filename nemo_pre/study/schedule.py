"""Several runs of a study at a time: first stages before what starts from them, progress, and one study at a place."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from nemo_pre.launch.environment import uses_gpu, visible_gpus
from nemo_pre.study.runs import RunFailed, StudyRun

REPORT_EVERY = 20.0  # seconds


def do_all(
    runs: Sequence[StudyRun], starts_from: Mapping[StudyRun, StudyRun], at_a_time: int, on_gpu: bool
) -> list[str]:
    """Do what is not finished, ``at_a_time`` runs in parallel; returns a sentence for each that failed.

    A run begins as soon as what it starts from is trained, while that may still be diagnosed; one whose turn it is not
    yet holds nobody up. A failure is told at once.

    Args:
        runs: in order of importance, each behind the run it starts from.
        on_gpu: every run has a GPU of its own.
    """
    turns = Turns([run for run in runs if not run.is_finished], starts_from)

    def work(environment: dict[str, str]) -> None:
        while (run := turns.take()) is not None:
            failure: str | None = f"{run.name}: not finished, by an error of the study's own."
            try:
                run.do(environment)
                failure = None
            except RunFailed as told:
                failure = str(told)
            finally:
                turns.end(run, failure)

    with ThreadPoolExecutor(at_a_time) as pool, _progress(turns):
        try:
            workers = [pool.submit(work, environment) for environment in _environments(at_a_time, on_gpu)]
            for worker in as_completed(workers):
                worker.result()
        finally:
            turns.stop()  # Ctrl-C ends the running processes by itself
    return turns.failures()


class Turns:
    """Whose turn it is: of the runs that nobody has taken, the first that can begin."""

    ASK_AGAIN = 5.0  # seconds: a run writes down that it is trained in the middle of its turn

    def __init__(self, todo: Sequence[StudyRun], starts_from: Mapping[StudyRun, StudyRun]) -> None:
        self.todo = list(todo)
        self.running: list[StudyRun] = []
        self.ended: dict[StudyRun, str | None] = {}
        self._starts_from = starts_from
        self._changed = threading.Condition()
        self._stopped = False

    def take(self) -> StudyRun | None:
        """The next run, once there is one that can begin; None when none is left."""
        with self._changed:
            while not self._stopped:
                for run in self._waiting():
                    before = self._starts_from.get(run)
                    if before is None or before.is_trained:
                        self.running.append(run)
                        return run
                    if before in self.ended or before not in self.todo:
                        self._end(run, f"{run.name}: not started, since its first stage failed.")
                if not self._waiting():
                    break
                self._changed.wait(self.ASK_AGAIN)
        return None

    def end(self, run: StudyRun, failure: str | None = None) -> None:
        with self._changed:
            self.running.remove(run)
            self._end(run, failure)
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nothing more begin."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def failures(self) -> list[str]:
        return [failure for run in self.todo if (failure := self.ended.get(run)) is not None]

    def _waiting(self) -> list[StudyRun]:
        return [run for run in self.todo if run not in self.ended and run not in self.running]

    def _end(self, run: StudyRun, failure: str | None) -> None:
        self.ended[run] = failure
        if failure is not None:
            print(failure, file=sys.stderr, flush=True)


def _environments(at_a_time: int, on_gpu: bool) -> list[dict[str, str]]:
    cores = len(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // at_a_time)))}
    if not on_gpu:
        return [threads] * at_a_time
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(number) for number in range(visible_gpus())]
    return [{**threads, "CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} for number in range(at_a_time)]


def most_at_a_time(platform: str) -> tuple[int, bool]:
    """How many runs of one rank this machine does at a time, and whether on GPUs."""
    on_gpu = uses_gpu(platform)
    return (visible_gpus() if on_gpu else len(os.sched_getaffinity(0))) or 1, on_gpu


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Nothing else runs a study there. A process that a killed study has left behind still counts: it inherits the
    lock.

    Raises:
        ValueError: something does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"Another study, or a run it left behind, works in {directory}: wait or end it."
            ) from error
        yield


# --- progress -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(turns: Turns) -> Iterator[None]:
    stopped = threading.Event()
    clock = Clock(turns, time.monotonic())

    def tell() -> None:
        while not stopped.wait(REPORT_EVERY):
            print(clock.line(time.monotonic()), file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        stopped.set()
        teller.join()


class Clock:
    """How far a study is, and when it will be done, judging by the steps since ``now``, weighted by their cost."""

    def __init__(self, turns: Turns, now: float) -> None:
        self._turns, self._started = turns, now
        self._at_start = self._work()
        self._total = sum(run.steps * run.cost for run in turns.todo)

    def _work(self) -> float:
        return sum(min(run.steps_done, run.steps) * run.cost for run in self._turns.todo)

    def line(self, now: float) -> str:
        work = self._work()
        speed = (work - self._at_start) / max(now - self._started, 1e-9)
        left = f"about {_time((self._total - work) / speed)} left" if speed > 0 else "starting"
        ended = self._turns.ended.copy()
        failed = sum(failure is not None for failure in ended.values())
        finished = f"{len(ended) - failed}/{len(self._turns.todo)} runs" + (f", {failed} failed" if failed else "")
        running = [f"{run.name} {run.phase}" for run in self._turns.running.copy()]
        share = work / self._total if self._total else 1.0
        return f"{finished}, {share:.0%}, {left} | {'; '.join(running)}"


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
