"""The seconds of a suite are those of its tests and of the processes they start."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.suite_seconds import read, table

CLONE = Path(__file__).resolve().parents[2]
SUITE = """
import subprocess, sys, time

BURN = "import time\\nwhile time.process_time() < 1.0: pass"

def test_works():
    exec(BURN.replace("< 1.0", f"< {time.process_time()} + 0.5"))

def test_starts_what_works():
    subprocess.run([sys.executable, "-c", BURN], check=True)

def test_waits():
    time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_of_mine.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\n")
    words = ["-p", "benchmarks.suite_seconds", "--suite-seconds", str(folder / "seconds"), "-n", "1", "-q"]
    command = [sys.executable, "-m", "pytest", *words, str(folder)]
    done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "seconds"


def test_work_counts_wherever_it_is_done_and_waiting_does_not(measured):
    machine, tests = read(measured)
    cpu = {test["test"].rpartition("::")[2]: test["cpu"] for test in tests}
    assert cpu.keys() == {"test_works", "test_starts_what_works", "test_waits"}
    assert cpu["test_works"] >= 0.45 and cpu["test_starts_what_works"] >= 0.95
    assert cpu["test_waits"] < cpu["test_works"]
    assert machine["cpu"] > sum(cpu.values()) and machine["wall"] > 1.5


def test_the_table_says_where_the_seconds_are(measured):
    machine, tests = read(measured)
    text = table(machine, tests)
    assert text.startswith("3 tests, ") and "test_starts_what_works" in text
    assert "| at most 4 s | " in text and "100%" in text


def test_a_folder_of_two_suites_or_of_none_is_refused(measured, tmp_path):
    with pytest.raises(ValueError, match="holds 0 finished suites"):
        read(tmp_path)
    for number, file in enumerate([*measured.glob("*.jsonl")] * 2):
        (tmp_path / f"{number}.jsonl").write_text(file.read_text())
    with pytest.raises(ValueError, match="holds 2 finished suites"):
        read(tmp_path)
