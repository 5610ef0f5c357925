"""A rank hears signals before anything is imported, and leaves a verdict that later ranks do not overwrite."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_pre import cli
from nemo_pre.launch import stopping
from nemo_pre.launch.environment import external_job
from nemo_pre.slurm import rank


@pytest.fixture
def quiet_signals(monkeypatch):
    """Puts handlers and what was heard back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    monkeypatch.setattr(stopping, "_heard", False)
    monkeypatch.delenv(stopping.STOP_FILE, raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_remembered_and_a_second_one_changes_nothing(quiet_signals, number):
    stopping.listen()
    assert not stopping.is_requested(look_for_file=True)
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert stopping.is_requested(look_for_file=False)


def test_the_batch_scripts_file_asks_for_a_stop_on_the_rank_that_looks(quiet_signals, monkeypatch, tmp_path):
    monkeypatch.setenv(stopping.STOP_FILE, str(tmp_path / "stop"))
    assert not stopping.is_requested(look_for_file=True)
    (tmp_path / "stop").touch()
    assert stopping.is_requested(look_for_file=True)
    assert not stopping.is_requested(look_for_file=False)


def test_the_first_verdict_counts(monkeypatch, tmp_path):
    monkeypatch.setenv(stopping.VERDICT_FILE, str(tmp_path / "verdict"))
    rank.leave_verdict("do-not-restart")
    rank.leave_verdict("requeue")
    assert (tmp_path / "verdict").read_text() == "do-not-restart"


@pytest.fixture
def ends_with(monkeypatch, quiet_signals):
    """Has ``nemo-pre train`` end with this code."""

    def install(code: int) -> None:
        def main(words: list[str]) -> int:
            raise SystemExit(code)

        monkeypatch.setattr(cli, "main", main)
        monkeypatch.setattr(rank, "forked_processes_die_with_their_parent", lambda: None)
        monkeypatch.setenv(stopping.EVERY_TASK_IS_A_RANK, "")  # is put back

    return install


def test_a_roll_back_is_left_to_ft_launcher_where_that_started_the_rank(ends_with, monkeypatch, tmp_path):
    ends_with(stopping.ROLL_BACK)
    monkeypatch.setenv(stopping.VERDICT_FILE, str(tmp_path / "verdict"))
    monkeypatch.setenv(rank.IN_PLACE, "socket")
    assert rank.main([]) == stopping.ROLL_BACK and not (tmp_path / "verdict").exists()
    monkeypatch.delenv(rank.IN_PLACE)
    assert rank.main([]) == stopping.ROLL_BACK and (tmp_path / "verdict").read_text() == "roll-back"


def test_a_rank_that_ft_launcher_starts_after_a_verdict_ends_at_once(ends_with, monkeypatch, tmp_path):
    ends_with(1)
    monkeypatch.setenv(stopping.VERDICT_FILE, str(tmp_path / "verdict"))
    (tmp_path / "verdict").write_text("requeue")
    assert rank.main([]) == 0


FORKS_AND_IS_KILLED = """
import multiprocessing, os, signal, sys, time
from nemo_pre.orphans import die_with, forked_processes_die_with_their_parent
forked_processes_die_with_their_parent()
forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
forked.start()
manager = multiprocessing.managers.SyncManager(ctx=multiprocessing.get_context("spawn"))
manager.start(die_with, (os.getpid(),))
print(forked.pid, manager._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_helper_processes_end_with_a_rank_that_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import multiprocessing.managers\nif __name__ == '__main__':\n"
                       + "".join(f"    {line}\n" for line in FORKS_AND_IS_KILLED.splitlines()))  # fmt: skip
    done = subprocess.run([sys.executable, str(program)], stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    # The pipe ended, so nobody holds it any more; what is left waits to be buried.
    for process in done.stdout.split():
        status = Path(f"/proc/{process}/stat")
        assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_wrong_option_is_a_verdict_against_restarting(tmp_path):
    verdict = tmp_path / "verdict"
    done = subprocess.run(
        [sys.executable, "-m", "nemo_pre.slurm.rank", "experiment=digits_tiny", "trainer.max_stepz=1"],
        env={**os.environ, stopping.VERDICT_FILE: str(verdict)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, verdict.read_text()) == (2, "do-not-restart")
    assert "There is no option trainer.max_stepz" in done.stderr


def test_listening_costs_no_import_of_torch():
    code = "import nemo_pre.slurm.rank, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_single_task_is_a_rank_where_the_batch_script_says_so_and_a_restart_has_another_port():
    job = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "1", "SLURM_JOB_ID": "42"}
    assert external_job(job) is None
    first = external_job({**job, stopping.EVERY_TASK_IS_A_RANK: "1"})
    second = external_job({**job, stopping.EVERY_TASK_IS_A_RANK: "1", "SLURM_RESTART_COUNT": "1"})
    assert first is not None and second is not None and first["WORLD_SIZE"] == "1"
    assert first["MASTER_PORT"] != second["MASTER_PORT"]
