"""One writer at a time in a run's folder, and no dead one leaves it shut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from nemo_pre.run_files import lock, queue
from nemo_pre.run_files.lock import LOCK, SILENCE, refuse_if_written, signs_of_life, this_process, writing


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def slurm(monkeypatch):
    """The states that the queue names, by job or step."""
    states: dict[str, str] = {}
    monkeypatch.setattr(queue, "has_queue", lambda: True)
    monkeypatch.setattr(queue, "state_of", lambda job: states.get(job, ""))
    monkeypatch.setattr(queue, "state_of_step", lambda step: states.get(step, ""))
    return states


def left_by(folder, owner, silent=0.0):
    """A lock that is there already, touched ``silent`` seconds ago."""
    path = folder / LOCK
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - silent,) * 2)


def elsewhere(**changes):
    return replace(this_process(), **{"host": "node9", "boot": "another", **changes})


def test_a_second_writer_is_refused_in_a_sentence_that_names_the_first(tmp_path):
    with writing(tmp_path):
        held = json.loads((tmp_path / LOCK).read_text())
        assert held["process"] == os.getpid() and held["started"] == lock.start_of(os.getpid())
        with pytest.raises(ValueError, match=rf"being written by process {os.getpid()} on .* \(it runs\): wait"):
            with writing(tmp_path):
                pass
        with pytest.raises(ValueError, match="being written by"):
            refuse_if_written(tmp_path)
    assert os.listdir(tmp_path) == []
    with writing(tmp_path):  # and again
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("wrong"), SystemExit(85)], ids=repr)
def test_the_lock_is_given_back_however_the_writer_ends(tmp_path, error):
    with pytest.raises(type(error)):
        with writing(tmp_path, keeps=(85,)):
            raise error
    assert not (tmp_path / LOCK).exists()


def test_a_job_that_goes_back_into_the_queue_keeps_it_for_its_next_life(tmp_path, monkeypatch, slurm):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit):
        with writing(tmp_path, keeps=(85,)):
            raise SystemExit(85)
    slurm["7"] = "PENDING"
    monkeypatch.delenv("SLURM_JOB_ID")
    held = json.loads((tmp_path / LOCK).read_text())
    left_by(tmp_path, replace(this_process(), **{**held, "process": 1 << 22, "started": 1}))  # its process is gone
    with pytest.raises(ValueError, match=r"job 7 .*PENDING"):
        with writing(tmp_path):
            pass
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with writing(tmp_path):
        pass


def test_a_process_that_was_killed_does_not_leave_it_shut(tmp_path):
    code = (
        "import sys, os, signal; from nemo_pre.run_files.lock import writing\n"
        f"with writing({str(tmp_path)!r}): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert (tmp_path / LOCK).is_file()
    refuse_if_written(tmp_path)
    with writing(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        assert os.listdir(tmp_path) == [LOCK]


def test_a_number_that_another_process_has_now_is_not_taken_for_the_owner():
    mine = this_process()
    assert signs_of_life(mine, mine, 0.0) == "it runs"
    assert signs_of_life(replace(mine, started=mine.started - 1), mine, 0.0) == ""


def test_elsewhere_without_slurm_the_heartbeat_decides(tmp_path):
    left_by(tmp_path, elsewhere(), silent=SILENCE - 60)
    with pytest.raises(ValueError, match=r"on node9, since .*last touched 2\d\d s ago, and free after 300 s"):
        with writing(tmp_path):
            pass
    left_by(tmp_path, elsewhere(), silent=SILENCE + 60)
    with writing(tmp_path):
        pass


@pytest.mark.parametrize(
    ("owner", "asks", "queued", "alive"),
    [
        ({"job": "7"}, {}, {"7": "RUNNING"}, "RUNNING"),
        ({"job": "7"}, {"job": "8"}, {"7": "PENDING", "8": "RUNNING"}, "PENDING"),
        ({"job": "7"}, {"job": "8"}, {"8": "RUNNING"}, ""),
        ({"job": "7", "restart": 0}, {"job": "7", "restart": 1}, {"7": "RUNNING"}, ""),
        ({"job": "7", "step": "0"}, {"job": "7", "step": "1"}, {"7": "RUNNING"}, ""),
        ({"job": "7", "step": "0"}, {"job": "7", "step": "1"}, {"7": "RUNNING", "7.0": "RUNNING"}, "RUNNING"),
        ({"job": "7", "step": "0"}, {"job": "7", "step": "0"}, {"7": "RUNNING", "7.0": "RUNNING"}, ""),
        ({"job": "7", "site": "a"}, {"job": "8", "site": "b"}, {}, "last touched 0 s ago"),  # another cluster's job 7
    ],
    ids=[
        "it runs", "it waits", "it has ended", "own former life", "own former step", "own other step",
        "own step, again in place", "another cluster",
    ],
)  # fmt: skip
def test_slurm_is_asked_about_a_job_on_another_node(slurm, owner, asks, queued, alive):
    slurm.update(queued)
    found = signs_of_life(elsewhere(**owner), replace(this_process(), **asks), 0.0)
    assert found.startswith(alive) and bool(found) == bool(alive)


def test_the_batch_scripts_steps_follow_each_other(slurm, monkeypatch):
    """In containers that do not see each other's processes, and cannot ask Slurm."""
    former, now = elsewhere(job="7", step="0"), replace(this_process(), job="7", step="1")
    slurm["7.0"] = "RUNNING"
    assert signs_of_life(former, now, 0.0)
    monkeypatch.setenv("NEMO_PRE_VERDICT_FILE", "slurm/7.0.verdict")
    assert signs_of_life(former, now, 0.0) == ""


def test_where_slurm_does_not_answer_nobody_is_taken_for_dead(monkeypatch):
    def unreachable(job):
        raise TimeoutError("Unable to contact slurm controller")

    monkeypatch.setattr(queue, "has_queue", lambda: True)
    monkeypatch.setattr(queue, "state_of", unreachable)
    assert "Unable to contact" in signs_of_life(elsewhere(job="7"), this_process(), 9e9)


@pytest.mark.parametrize(
    ("answer", "state"),
    [("echo PENDING", "PENDING"), ("echo COMPLETING", ""), ("echo 'error: Invalid job id specified' >&2; exit 1", "")],
    ids=["waits", "ends", "forgotten"],
)  # fmt: skip
def test_what_squeue_says(tmp_path, monkeypatch, answer, state):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert queue.has_queue() and queue.state_of("7") == state


def test_of_many_that_find_a_dead_owner_one_wins(tmp_path, monkeypatch):
    """Each has an identity of its own, and lives for the others."""
    everybody = [replace(this_process(), host=f"node{number}") for number in range(8)]
    monkeypatch.setattr(lock, "signs_of_life", lambda owner, *_: "" if owner.host == "dead" else "it runs")
    for _ in range(20):
        (tmp_path / LOCK).unlink(missing_ok=True)
        left_by(tmp_path, elsewhere(host="dead"))
        won, together = [], threading.Barrier(len(everybody))

        def attempt(mine, won=won, together=together):
            together.wait()
            try:
                lock.take(tmp_path, mine)
            except ValueError:
                return
            won.append(mine.token)

        threads = [threading.Thread(target=attempt, args=(mine,)) for mine in everybody]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [json.loads((tmp_path / LOCK).read_text())["token"]]


def test_one_that_died_while_it_followed_a_dead_owner_is_followed_itself(tmp_path):
    first, second = elsewhere(), elsewhere()
    left_by(tmp_path, first, silent=SILENCE + 1)
    following = tmp_path / f"{LOCK}.after-{first.token}"
    following.write_text(json.dumps(asdict(second)))
    with pytest.raises(ValueError, match="last touched"):  # it may be about to move up
        with writing(tmp_path):
            pass
    os.utime(following, (time.time() - SILENCE - 1,) * 2)
    with writing(tmp_path):
        assert os.listdir(tmp_path) == [LOCK]


def test_file_systems_without_links_have_exclusive_creation(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    with writing(tmp_path):
        with pytest.raises(ValueError, match="being written by"):
            with writing(tmp_path):
                pass
    with writing(tmp_path):
        pass


def test_a_writer_that_was_taken_for_dead_ends_when_it_wakes(tmp_path, capsys):
    mine, ended = this_process(), []
    lock.take(tmp_path, mine)
    beating = lock._Heartbeat(tmp_path, mine, end=ended.append)
    os.utime(tmp_path / LOCK, (1, 1))
    beating.beat()
    assert time.time() - (tmp_path / LOCK).stat().st_mtime < 60 and not ended
    (tmp_path / LOCK).unlink()
    beating.beat()  # removed by hand: put back
    assert json.loads((tmp_path / LOCK).read_text())["token"] == mine.token and not ended
    left_by(tmp_path, elsewhere())
    beating.beat()
    assert ended == [lock.LOST] and "was taken over by process" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"token": 1}', "\0\0"])
def test_a_file_that_is_no_lock_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(ValueError, match=r"lock.json names no process: remove it"):
        with writing(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*file/run cannot be written to: Not a directory\."):
        with writing(tmp_path / "file" / "run"):
            pass
