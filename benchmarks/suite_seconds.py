"""What the test suite's time is made of: CPU seconds of each test, with those of the processes it starts.

    make test PYTEST_ADDOPTS="-p benchmarks.suite_seconds --suite-seconds FOLDER"
    python -m benchmarks.suite_seconds FOLDER      # by folder of tests, by how long a test takes, and the longest

Seconds of the wall say little where two workers and sixteen ranks share two cores. Counted are a worker and all below
it that are alive or were waited for; not what was adopted by another process meanwhile, as Slurm's jobs are. The
machine's busy seconds over the whole suite, in a line of their own, have these too, and all else that ran beside.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TICKS = os.sysconf("SC_CLK_TCK")
CLASSES = (0.1, 1.0, 4.0, 10.0, 1e9)  # upper ends, CPU seconds
LONGEST = 20
MACHINE = "machine"  # the name of the line of all processors


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite-seconds", metavar="FOLDER", help="write the CPU seconds of each test there")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--suite-seconds")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(Meter(Path(folder), is_worker=hasattr(config, "workerinput")))


class Meter:
    """Writes a line for each test of this process, and where it is the one the user started, the machine's seconds."""

    def __init__(self, folder: Path, is_worker: bool) -> None:
        self._file = folder / f"{os.getpid()}.jsonl"
        self._is_worker = is_worker
        self._began = time.time(), busy_seconds()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        wall, cpu = time.time(), seconds_below(os.getpid())
        try:
            return (yield)
        finally:
            self._write(item.nodeid, time.time() - wall, seconds_below(os.getpid()) - cpu)

    def pytest_sessionfinish(self) -> None:
        if not self._is_worker:
            wall, busy = self._began
            self._write(MACHINE, time.time() - wall, busy_seconds() - busy)

    def _write(self, test: str, wall: float, cpu: float) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"test": test, "wall": round(wall, 2), "cpu": round(cpu, 2)}) + "\n")


def seconds_below(root: int) -> float:
    """CPU seconds of a process, of those below it, and of those that these have waited for."""
    children: dict[int, list[int]] = defaultdict(list)
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        process = int(stat.parent.name)
        children[int(fields[1])].append(process)
        ticks[process] = sum(map(int, fields[11:15]))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        total += ticks.get(process, 0)
        waiting += children[process]
    return total / TICKS


def busy_seconds() -> float:
    """CPU seconds of everything since the machine's start: user, nice and system."""
    return sum(map(int, Path("/proc/stat").read_text().split()[1:4])) / TICKS


# --- what was measured ---------------------------------------------------------------------------------------------


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine's line, and those of the tests.

    Raises:
        ValueError: the folder holds no finished suite, or more than one.
    """
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    machine = [line for line in lines if line["test"] == MACHINE]
    if len(machine) != 1:
        raise ValueError(f"{folder} holds {len(machine)} finished suites: run one into a new folder.")
    return machine[0], [line for line in lines if line["test"] != MACHINE]


def table(machine: dict[str, Any], tests: list[dict[str, Any]]) -> str:
    """The figures as text."""
    total = sum(test["cpu"] for test in tests)
    cores = len(os.sched_getaffinity(0))
    told = [
        f"{len(tests)} tests, {total:.0f} CPU seconds; the machine was busy for {machine['cpu']:.0f} of "
        f"{machine['wall']:.0f} s on {cores} cores",
        "",
        "| tests of | tests | CPU s | share |",
        "|---|---|---|---|",
    ]
    by_folder: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for test in tests:
        folder = "/".join(test["test"].partition("::")[0].split("/")[:2])
        by_folder[folder] += test["cpu"]
        number[folder] += 1
    told += [f"| {name} | {number[name]} | {cpu:.0f} | {cpu / total:.0%} |" for name, cpu in by_folder.most_common()]
    told += ["", "| tests that take | tests | CPU s | share |", "|---|---|---|---|"]
    least = float("-inf")
    for most in CLASSES:
        held = [test["cpu"] for test in tests if least < test["cpu"] <= most]
        name = f"more than {least:g} s" if most == CLASSES[-1] else f"at most {most:g} s"
        told.append(f"| {name} | {len(held)} | {sum(held):.0f} | {sum(held) / total:.0%} |")
        least = most
    told += ["", "| longest | CPU s | wall s |", "|---|---|---|"]
    longest = sorted(tests, key=lambda test: -test["cpu"])[:LONGEST]
    told += [f"| {test['test']} | {test['cpu']:.0f} | {test['wall']:.0f} |" for test in longest]
    return "\n".join(told)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(table(*read(parser.parse_args().folder)))
