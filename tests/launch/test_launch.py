"""Local ranks are started as one job, and a job never outlives one of its ranks by long."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_pre.launch.environment import external_job, first_host
from nemo_pre.launch.ranks import GRACE, TERM_WAIT

REPOSITORY = Path(__file__).resolve().parents[2]
START = 15.0  # seconds a loaded machine may need to start Python, compose and fork


def start(function, output_dir, *overrides, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.launch.entries", function, str(output_dir), *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite in the background of a script ignores Ctrl-C, and what it starts would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(function, output_dir, *overrides, **environment):
    """Exit code, standard output, standard error and seconds."""
    begin = time.monotonic()
    job = start(function, output_dir, *overrides, **environment)
    output, errors = job.communicate(timeout=60)
    return job.returncode, output, errors, time.monotonic() - begin


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def busy():
    """Whether other work than the tests' has the cores."""
    return os.getloadavg()[0] > 2 * len(os.sched_getaffinity(0))


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started_pids(output_dir):
    return [int((output_dir / name).read_text()) for name in ("pid0", "pid1")]


def test_every_rank_runs_in_a_process_of_its_own_and_knows_its_place(tmp_path):
    code, output, errors, _ = run("report", tmp_path, "parallel=tp2_pp2_sp", OMP_NUM_THREADS="1")
    assert (code, errors) == (0, "")
    reports = [ast.literal_eval((tmp_path / f"report{rank}").read_text()) for rank in range(4)]
    assert len({pid for pid, _, _ in reports}) == 4
    assert len({parent for _, parent, _ in reports}) == 1  # the server that forks them
    for rank, (_, _, values) in enumerate(reports):
        assert (values["RANK"], values["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (values["WORLD_SIZE"], values["LOCAL_WORLD_SIZE"]) == ("4", "4")
        assert values["MASTER_ADDR"] == "127.0.0.1"
        assert values["MASTER_PORT"] == reports[0][2]["MASTER_PORT"]
        assert values["OMP_NUM_THREADS"] == "1"
    assert output == "rank 0 speaks\n"
    assert (tmp_path / "rank3.log").read_text() == "rank 3 speaks\n"


OWN = {"OWN_WORDS": "1", "PRELOAD": "tests.launch.chatty"}
EXTERNAL = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
ALL_KINDS = ("by a logger", "a warning", "compiled code\n", "compiled code's error")


def test_what_libraries_say_is_in_a_file_and_a_failing_rank_s_whole_log_is_kept(tmp_path):
    for _ in range(2):
        code, output, errors, _ = run("libraries_speak", tmp_path, **OWN)
    assert code == 1 and output == "step 1/2\n"
    seen, _, failure = errors.partition("Rank 0 of 1 ended with RuntimeError: the reactor is cold; its output is in ")
    assert seen.splitlines()[:2] == ["resuming", "warning: a damaged checkpoint"] and "a fault of theirs" in seen
    assert "library:" not in seen and failure.startswith(f"{tmp_path}/rank0.log.")
    for log in ("rank0.log", "rank0.former.log"):
        kept = (tmp_path / log).read_text()
        assert all(f"library: {kind}" in kept for kind in ALL_KINDS), kept
        assert "RuntimeError: the reactor is cold" in kept and "a detail" not in kept


def test_verbose_brings_the_libraries_words_back(tmp_path):
    _, output, errors, _ = run("libraries_speak", tmp_path, NEMO_PRE_VERBOSE="1", **OWN)
    assert all(f"library: {kind}" in output + errors for kind in ALL_KINDS), output + errors
    assert "warning: a damaged checkpoint\n" in errors and not list(tmp_path.glob("*.log"))


def test_under_a_launcher_compiled_errors_and_tracebacks_stay_in_its_record(tmp_path):
    _, output, errors, _ = run("libraries_speak", tmp_path, **OWN, **EXTERNAL)
    assert output == "step 1/2\n" and "resuming\nwarning: a damaged checkpoint\n" in errors
    assert "RuntimeError: the reactor is cold" in errors and "library: compiled code's error" in errors
    kept = (tmp_path / "libraries.log").read_text()
    for kind in ALL_KINDS[:3]:
        assert f"library: {kind}" in kept and f"library: {kind}" not in output + errors.partition("Traceback")[0]


def test_one_rank_is_started_the_same_way(tmp_path):
    code, output, _, _ = run("report", tmp_path)
    assert (code, output) == (0, "rank 0 speaks\n")
    assert ast.literal_eval((tmp_path / "report0").read_text())[2]["WORLD_SIZE"] == "1"


def test_an_exception_on_one_rank_ends_the_job_and_is_told(tmp_path):
    code, _, errors, seconds = run("rank_1_raises", tmp_path, "parallel=dp2")
    assert code == 1
    assert errors.startswith("Rank 1 of 2 ended with RuntimeError: the reactor is cold; its output is in ")
    assert 'raise RuntimeError("the reactor is cold")' in errors
    assert "the reactor is cold" in (tmp_path / "rank1.log").read_text()
    assert seconds < START + GRACE + TERM_WAIT
    assert not any(map(is_alive, started_pids(tmp_path)))


def test_a_rank_ended_by_a_signal_ends_the_job_and_is_told(tmp_path):
    code, _, errors, seconds = run("rank_1_is_killed", tmp_path, "parallel=dp2")
    assert code == 1
    assert errors.startswith("Rank 1 of 2 was ended by SIGKILL (out of memory?); its output is in ")
    assert seconds < START + GRACE + TERM_WAIT
    assert not any(map(is_alive, started_pids(tmp_path)))


def test_a_rank_that_hangs_and_ignores_sigterm_does_not_keep_the_job_alive(tmp_path):
    code, _, errors, seconds = run("rank_0_ignores_everything", tmp_path, "parallel=dp2")
    assert code == 1
    assert errors.startswith("Rank 1 of 2 ended with RuntimeError: the reactor is cold")
    assert seconds < START + GRACE + TERM_WAIT
    assert not any(map(is_alive, started_pids(tmp_path)))


def test_the_cause_is_named_not_the_rank_that_failed_of_it(tmp_path):
    code, _, errors, _ = run("rank_0_is_heard_of_before_rank_1_is_killed", tmp_path, "parallel=dp2")
    assert code == 1
    assert errors.startswith("Rank 1 of 2 was ended by SIGKILL")


def test_an_exit_code_is_told(tmp_path):
    code, _, errors, _ = run("rank_1_exits", tmp_path, "parallel=dp2")
    assert code == 1
    assert errors.startswith("Rank 1 of 2 exited with code 7")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_the_launcher_ends_every_rank(tmp_path, number, code):
    job = start("sleep", tmp_path, "parallel=dp2")
    wait_for(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in ("pid0", "pid1")))
    job.send_signal(number)
    assert job.wait(timeout=TERM_WAIT + 10) == code
    assert not any(map(is_alive, started_pids(tmp_path)))


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path):
    job = start("sleep", tmp_path, "parallel=dp2")
    wait_for(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in ("pid0", "pid1")))
    job.kill()
    job.wait(timeout=10)
    wait_for(lambda: not any(map(is_alive, started_pids(tmp_path))), seconds=10)


def all_below(pid):
    """The processes that ``pid`` has started, and those that they have."""
    found, waiting = set(), [pid]
    while waiting:
        parent = waiting.pop()
        for children in Path("/proc").glob(f"{parent}/task/*/children"):
            new = set(map(int, children.read_text().split())) - found
            found |= new
            waiting += new
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_nothing_is_left_where_a_launcher_ends_while_ranks_train(tmp_path, number, code):
    """Helper processes of a rank end with it; Ctrl-C reaches the whole group, as in a terminal."""
    job = start("sleep_with_a_helper", tmp_path, "parallel=dp2")
    wait_for(lambda: all((tmp_path / f"helper{rank}").exists() for rank in (0, 1)))
    started = all_below(job.pid)
    assert len(started) >= 5  # the server, two ranks, their helpers
    begin = time.monotonic()
    os.killpg(job.pid, number) if number == signal.SIGINT else job.send_signal(number)
    assert job.wait(timeout=15) == code
    assert time.monotonic() - begin < TERM_WAIT + 2 + (START if busy() else 0)
    wait_for(lambda: not any(map(is_alive, started)), seconds=15)


def test_a_loaders_workers_do_not_outlive_a_rank_that_is_killed(tmp_path):
    """The server that forked them is not the rank, and Linux would end them with their parent alone."""
    job = start("sleep_with_a_loader", tmp_path, "parallel=single")
    wait_for(lambda: (tmp_path / "pid0").exists() and (tmp_path / "pid0").read_text(), seconds=60)
    rank = int((tmp_path / "pid0").read_text())
    started = all_below(rank)
    assert len(started) >= 2  # a server and the worker
    os.kill(rank, signal.SIGKILL)
    assert job.wait(timeout=15) == 1
    wait_for(lambda: not any(map(is_alive, started)), seconds=15)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_nothing_is_left_where_a_launcher_ends_while_the_libraries_are_imported(tmp_path, number, code):
    server = tmp_path / "server"
    job = start("sleep", tmp_path, PRELOAD="tests.launch.slow_import", SERVER_FILE=str(server))
    wait_for(lambda: server.exists() and server.read_text())
    started = all_below(job.pid)
    assert int(server.read_text()) in started
    os.killpg(job.pid, number) if number == signal.SIGINT else job.send_signal(number)
    assert job.wait(timeout=5 + START) == code
    assert "Traceback" not in job.communicate()[1]
    wait_for(lambda: not any(map(is_alive, started)), seconds=15)


def test_a_program_on_the_leash_ends_with_the_one_that_started_it(tmp_path):
    program = (
        "import subprocess, sys; from nemo_pre.launch.leash import leashed; "
        "job = subprocess.Popen(leashed(['sleep', '60'])); print(job.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    wait_for(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n")
    parent.kill()
    parent.communicate()
    wait_for(lambda: not is_alive(child), seconds=10)


def test_a_rank_of_an_external_launcher_runs_in_place(tmp_path):
    code, output, _, _ = run(
        "report", tmp_path, "parallel=dp2", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="h", MASTER_PORT="1"
    )
    assert (code, output) == (0, "rank 1 speaks\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report1"]


def test_a_launcher_that_started_another_number_of_ranks_is_refused(tmp_path):
    code, _, errors, _ = run("report", tmp_path, RANK="0", WORLD_SIZE="2")
    assert code == 2
    assert errors.startswith("The layout needs 1 ranks but the launcher started 2")


def test_several_nodes_need_a_launcher(tmp_path):
    code, _, errors, _ = run("report", tmp_path, "parallel=dp2", "cluster.nodes=2")
    assert code == 2
    assert errors.startswith("cluster.nodes=2 needs a launcher")


SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
}


def test_slurms_variables_become_torchs():
    job = external_job(SLURM)
    assert job is not None
    assert (job["RANK"], job["LOCAL_RANK"], job["WORLD_SIZE"], job["MASTER_ADDR"]) == ("5", "1", "8", "gpu07")
    assert external_job({**SLURM, "SLURM_PROCID": "0"})["MASTER_PORT"] == job["MASTER_PORT"]
    assert 20_000 <= int(job["MASTER_PORT"]) < 30_000
    assert external_job({**SLURM, "MASTER_PORT": "7", "MASTER_ADDR": "x"})["MASTER_ADDR"] == "x"


def test_a_batch_script_and_a_single_task_are_no_ranks():
    assert external_job({}) is None
    assert external_job({key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}) is None
    assert external_job({**SLURM, "SLURM_NTASKS": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],login", "gpu07"),
        ("rack1-n[3]", "rack1-n3"),
        ("a[1-2]b", "a1b"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first
