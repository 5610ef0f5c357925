"""Several runs of a study at a time: first stages before what starts from them, progress, and one study at a place."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from nemo_pre.launch.environment import uses_gpu, visible_gpus
from nemo_pre.study.runs import RunFailed, StudyRun

REPORT_EVERY = 20.0  # seconds


def do_all(
    runs: Sequence[StudyRun], starts_from: Mapping[StudyRun, StudyRun], at_a_time: int, on_gpu: bool
) -> list[str]:
    """Do what is not finished, ``at_a_time`` runs in parallel; returns a sentence for each that failed.

    Args:
        runs: each behind the run it starts from.
        on_gpu: every run has a GPU of its own.
    """
    todo = [run for run in runs if not run.is_finished]
    devices: queue.Queue[dict[str, str]] = queue.Queue()
    for environment in _environments(at_a_time, on_gpu):
        devices.put(environment)
    done: dict[StudyRun, Future[None]] = {}

    def work(run: StudyRun) -> None:
        before = done.get(starts_from[run]) if run in starts_from else None
        if before is not None and before.exception() is not None:
            raise RunFailed(f"{run.name}: not started, since its first stage failed.")
        environment = devices.get()
        try:
            run.do(environment)
        finally:
            devices.put(environment)

    with ThreadPoolExecutor(at_a_time) as pool, _progress(todo, done):
        try:
            for run in todo:
                done[run] = pool.submit(work, run)
            return [str(error) for run in todo if (error := done[run].exception()) is not None]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C ends the running processes by itself
            raise


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
def _progress(todo: Sequence[StudyRun], done: Mapping[StudyRun, Future[None]]) -> Iterator[None]:
    ended = threading.Event()
    clock = Clock(todo, time.monotonic())

    def tell() -> None:
        while not ended.wait(REPORT_EVERY):
            print(clock.line(dict(done), time.monotonic()), file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


class Clock:
    """How far a study is, and when it will be done, judging by the steps since ``now``, weighted by their cost."""

    def __init__(self, todo: Sequence[StudyRun], now: float) -> None:
        self._todo, self._started = todo, now
        self._at_start = self._work()
        self._total = sum(run.steps * run.cost for run in todo)

    def _work(self) -> float:
        return sum(min(run.steps_done, run.steps) * run.cost for run in self._todo)

    def line(self, done: Mapping[StudyRun, Future[None]], now: float) -> str:
        work = self._work()
        speed = (work - self._at_start) / max(now - self._started, 1e-9)
        left = f"about {_time((self._total - work) / speed)} left" if speed > 0 else "starting"
        finished = sum(future.done() for future in done.values())
        running = [f"{run.name} {run.phase}" for run, future in done.items() if future.running()]
        share = work / self._total if self._total else 1.0
        return f"{finished}/{len(self._todo)} runs, {share:.0%}, {left} | {'; '.join(running)}"


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
