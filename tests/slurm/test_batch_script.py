"""The batch script on a real Slurm, around ranks that end at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_pre.slurm.submit import parse, render
from slurm.testbed.bed import TestBed, wait_for

RANK, SUMS = "-m nemo_pre.slurm.rank", "-m nemo_pre.slurm.all_reduce"
STOPS_WHEN_ASKED = """
import os, time
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    while not os.path.exists(os.environ["NEMO_PRE_STOP_FILE"]):
        time.sleep(0.1)
    open(os.environ["NEMO_PRE_VERDICT_FILE"], "w").write("requeue")
    raise SystemExit(85)
"""
NEVER_STOPS = """
import os, time
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    time.sleep(500)
"""
ROLLS_BACK_ONCE = """
import os
if not os.path.exists("rolled back"):
    open("rolled back", "w").close()
    open(os.environ["NEMO_PRE_VERDICT_FILE"], "x").write("roll-back")
    raise SystemExit(86)
"""


FAILS_ON_NODE1 = """
import os
assert os.environ["SLURMD_NODENAME"] != "node1"
print(os.environ["SLURMD_NODENAME"], "adds up")
"""


@dataclass
class Job:
    """``slurm`` is the folder of its logs."""

    number: str
    slurm: Path

    @property
    def log(self) -> str:
        return (self.slurm / f"{self.number}.log").read_text()


@pytest.fixture(scope="module")
def jobs(bed: TestBed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All at once, since they spend their time waiting."""
    folder = tmp_path_factory.mktemp("jobs")
    unchecked = "cluster.health_check=false"

    def script(name: str, *more: str) -> str:
        words = ["experiment=digits_tiny", "cluster=slurm_testbed", "parallel=single", "cluster.nodes=1"]
        (job,) = render(parse([*words, "platform=cpu", f"output_dir={folder / name}", *more, "--dry-run"]))
        return job.script

    def submit(name: str, text: str) -> Job:
        slurm = folder / name / "slurm"
        slurm.mkdir(parents=True)
        (slurm / "job.sbatch").write_text(text)
        number = bed.command("sbatch", "--parsable", f"--chdir={folder / name}", str(slurm / "job.sbatch"))
        return Job(number, slurm)

    def with_rank(name: str, program: str, *more: str, sums: str | None = None) -> Job:
        text = script(name, *more)
        for place, instead in ((RANK, program), (SUMS, sums)):
            if instead is not None:
                file = folder / f"{name}-{place.rpartition('.')[2]}.py"
                file.write_text(instead)
                text = text.replace(place, str(file))
        return submit(name, text)

    def by_hand(name: str) -> Job:
        words = ["experiment=digits_tiny", "parallel=dp2", "platform=cpu", f"output_dir={folder / name}"]
        return Job(bed.submit_by_hand(folder / f"{name}.log", "node5", *words), folder / name / "slurm")

    nvidia_smi = folder / "bin" / "nvidia-smi"
    nvidia_smi.parent.mkdir()
    nvidia_smi.write_text("#!/bin/sh\n[ $SLURMD_NODENAME = node1 ] || echo 0\n")
    nvidia_smi.chmod(0o755)
    wrong = "\nWORDS=(no.such.option=1 "
    unfit = script("unfit").replace(f"HEALTH=({folder / 'unfit'} 0 ", f"HEALTH=({folder / 'unfit'} 1 ")
    unfit = unfit.replace("\nWORDS=(", f"\nexport PATH={nvidia_smi.parent}:$PATH{wrong}")
    two_nodes = ["parallel=dp2", "cluster.nodes=2", "cluster.all_reduce_check=true"]
    time_limit = ["cluster.time_limit=00:01:00", "cluster.warning_seconds=50", unchecked]
    return {
        "unfit": submit("unfit", unfit),
        "adding up": with_rank("adding_up", "exit(0)", *two_nodes),
        "not adding up": with_rank(
            "not_adding_up",
            "exit(0)",
            *two_nodes,
            "cluster.sbatch_options=['--nodelist=node1']",
            "cluster.max_failures=1",
            sums=FAILS_ON_NODE1,
        ),
        "by hand": by_hand("by_hand"),
        "no room": submit("no_room", script("no_room", "cluster.min_free_gb=1e9")),
        "wrong": submit("wrong", script("wrong", unchecked).replace("\nWORDS=(", wrong)),
        "failing": with_rank("failing", "exit(7)", "cluster.max_failures=2", unchecked),
        "cancelled": with_rank("cancelled", "import time; time.sleep(500)", unchecked),
        "at its limit": with_rank("at_its_limit", STOPS_WHEN_ASKED, *time_limit),
        "stubborn": with_rank("stubborn", NEVER_STOPS, "cluster.warning_seconds=2", unchecked),
        "rolling back": with_rank("rolling_back", ROLLS_BACK_ONCE, unchecked),
    }


def ends(bed: TestBed, job: Job, state: str, restarts: int) -> bool:
    found = bed.wait_for_state(job.number, "FAILED", "COMPLETED", "TIMEOUT", "CANCELLED", seconds=200)
    assert (found, int(bed.shown(job.number, "Restarts"))) == (state, restarts), job.number
    return True


def test_a_job_that_somebody_cancels_stays_cancelled(bed, jobs):
    bed.wait_for_state(jobs["cancelled"].number, "RUNNING", seconds=60)
    bed.command("scancel", jobs["cancelled"].number)
    assert ends(bed, jobs["cancelled"], "CANCELLED", 0)


def test_ranks_that_do_not_stop_in_time_are_requeued_all_the_same(bed, jobs):
    job = jobs["stubborn"]
    wait_for((job.slurm / f"{job.number}.0.log").exists, 60, lambda: "the ranks do not start")
    bed.signal_batch_script(job.number)
    assert ends(bed, job, "COMPLETED", 1) and "the ranks did not stop in time" in job.log


def test_a_node_that_fails_the_health_check_is_excluded_and_the_job_tries_another(bed, jobs):
    job = jobs["unfit"]
    assert ends(bed, job, "FAILED", 1) and "node1 is bad: 0 of 1 GPUs" in job.log and "excluding node1" in job.log
    assert bed.shown(job.number, "ExcNodeList") == "node1" != bed.shown(job.number, "NodeList")


def test_ranks_start_where_all_add_up_and_a_node_that_does_not_is_found(bed, jobs):
    well, bad = jobs["adding up"], jobs["not adding up"]
    assert ends(bed, well, "COMPLETED", 0)
    health = (well.slurm / f"{well.number}.0.health").read_text()
    assert health.count(" adds up\n") == 2 and "all add up, at " in health
    assert ends(bed, bad, "FAILED", 0) and "bad nodes: node1, failure 1 in a row" in bad.log


def test_a_disk_without_room_ends_the_job_and_blames_no_node(bed, jobs):
    assert ends(bed, jobs["no room"], "FAILED", 0) and "GB free" in jobs["no room"].log
    assert bed.shown(jobs["no room"].number, "ExcNodeList") == "(null)"


def test_a_wrong_option_ends_the_job_at_once_and_a_failing_one_after_so_many_times(bed, jobs):
    wrong, failing = jobs["wrong"], jobs["failing"]
    assert ends(bed, wrong, "FAILED", 0) and ends(bed, failing, "FAILED", 1)
    assert "There is no option no" in (wrong.slurm / f"{wrong.number}.0.log").read_text()
    assert "failure 2 in a row without a new checkpoint: giving up" in failing.log


def test_ranks_that_roll_back_start_again_without_a_requeue(bed, jobs):
    assert ends(bed, jobs["rolling back"], "COMPLETED", 0)
    assert "again, from the last checkpoint" in jobs["rolling back"].log


def test_a_job_near_its_time_limit_is_asked_to_stop_and_goes_on_after_a_requeue(bed, jobs):
    assert ends(bed, jobs["at its limit"], "COMPLETED", 1)
    assert "stopped at a checkpoint: back into the queue" in jobs["at its limit"].log


def test_the_script_written_by_hand_takes_the_sizes_from_slurm(bed, jobs):
    job = jobs["by hand"]
    sentence = "The layout has 2 ranks (tensor x pipeline x context x data) but the cluster 1 x 1 devices"
    assert ends(bed, job, "FAILED", 0) and sentence in (job.slurm / f"{job.number}.0.log").read_text()
