"""Jobs on a real Slurm: what happens to them does not show in what they learn."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_pre.scaling.scale import scale
from slurm.testbed.bed import TestBed, cut_newest_checkpoint, is_saving, losses, samples, wait_for
from tests.slurm.runs import SHARED, log_of, one_rank, wait_for_step, words

pytestmark = pytest.mark.timeout(1800)  # about three minutes where nothing else runs

LONG = [
    "experiment=digits_tiny", "parallel=dp2", "trainer.max_steps=40", "trainer.checkpoint_every=4",
    "trainer.global_batch_size=32", "trainer.hang_timeout=30",
]  # fmt: skip
OVER = ("COMPLETED", "FAILED", "CANCELLED")


@dataclass
class Jobs:
    """Numbers of the jobs, and the folder their runs lie in."""

    folder: Path
    chain: list[str]
    sweep: str
    diverging: list[str]
    by_hand: str
    scaled: list[str]
    quiet: str
    in_place: str


@pytest.fixture(scope="module")
def jobs(bed: TestBed, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All at once, since most of a job's time is its start. A rank of ``in_place`` hangs from its third step on."""
    folder = tmp_path_factory.mktemp("jobs")
    one_node = ["cluster.nodes=1", f"cluster.sbatch_options=['--nodelist={SHARED}']"]
    short = one_rank(folder / "${name}", digits, "objective.pre.layers=[1]")
    diverging = one_rank(folder / "diverging" / "${name}", digits, "objective.pre.layers=[1]", "optim.lr=1e30")
    by_hand = [word for word in one_rank(folder / "by_hand", digits) if not word.startswith("cluster")]

    jobs = Jobs(
        folder,
        chain=bed.submit(*short, "chain=[digits_tiny,digits_tiny_pre,export]"),
        sweep=bed.submit(*short, "experiment=digits_tiny", "name=tried", "sweep=seed=1,2")[0],
        diverging=bed.submit(*diverging, "chain=[digits_tiny,digits_tiny_pre]", "optim.warmup_ratio=0",
                             "trainer.max_steps=50"),
        by_hand=bed.submit_by_hand(folder / "by_hand.log", SHARED, "experiment=digits_tiny", *by_hand),
        scaled=bed.submit(*_scaled(folder), "action=submit", *_of_the_grid(short), verb="scale"),
        quiet=bed.submit(*words(folder / "quiet", digits, *LONG, *one_node))[0],
        in_place=bed.submit(*words(folder / "in_place", digits, *LONG, *one_node, "cluster.ft_restarts=1"))[0],
    )  # fmt: skip
    wait_for_step(bed, jobs.in_place, folder / "in_place", 3)
    bed.signal_rank(jobs.in_place, 1, signal.SIGSTOP)
    return jobs


def _scaled(folder: Path) -> list[str]:
    """A scaling study's grid of two points."""
    grid = ["experiments=digits_tiny", "gpus=1", "layouts=recipe", "regularizers=none,pre"]
    return [*grid, f"out={folder / 'scaled'}", "trainer.global_batch_size=8"]


def _of_the_grid(words: list[str]) -> list[str]:
    """What the grid does not say by itself."""
    ours = ("output_dir", "parallel", "trainer.global_batch_size")
    return [word for word in words if word.partition("=")[0] not in ours]


def test_preemption_a_kill_in_a_checkpoint_a_crash_and_a_hang_of_a_node_leave_the_losses_as_they_were(
    bed, digits, jobs
):
    run = jobs.folder / "disturbed"
    (job,) = bed.submit(*words(run, digits, *LONG, f"cluster.exclude=[{SHARED}]"))
    wait_for_step(bed, job, run, 3)
    urgent = bed.command("sbatch", "--parsable", "-purgent", "-N4", "--exclusive", f"--exclude={SHARED}",
                         "-o/dev/null", "--wrap=true")  # fmt: skip
    for _ in range(2):  # beside the one that announces the preemption
        bed.signal_batch_script(job)
    bed.wait_for_state(urgent, "COMPLETED")

    wait_for_step(bed, job, run, 9)
    wait_for(lambda: is_saving(run), 300, lambda: "no checkpoint is written", every=0.002)
    bed.signal_rank(job, 1, signal.SIGKILL)
    cut = cut_newest_checkpoint(run)

    wait_for_step(bed, job, run, 14)
    crashed = bed.node_of(job, 0)
    bed.fault(crashed, "crash")
    wait_for(lambda: bed.shown(job, "Restarts") == "3", 300, lambda: "the crash is not noticed")

    wait_for_step(bed, job, run, 18)
    hung = bed.node_of(job, 1)
    assert crashed not in (hung, bed.node_of(job, 0))
    bed.fault(hung, "hang")
    wait_for(lambda: bed.shown(job, "Restarts") == "4", 300, lambda: "the hang is not noticed")
    for node in (crashed, hung):
        bed.fault(node, "back")

    assert bed.wait_for_state(job, *OVER) == bed.wait_for_state(jobs.quiet, *OVER) == "COMPLETED"
    assert int(bed.shown(job, "Restarts")) == 4
    stopped = re.search(r"stopped after step (\d+)", log_of(run, job, 0))
    assert stopped is not None and f"training from step {stopped[1]} to" in log_of(run, job, 1)
    assert f"step={cut} is damaged" in log_of(run, job, 2)
    assert losses(run) == losses(jobs.folder / "quiet") and samples(run) == samples(jobs.folder / "quiet")


def test_ft_launcher_starts_the_ranks_again_in_place_when_one_hangs(bed, jobs):
    job, run = jobs.in_place, jobs.folder / "in_place"
    assert bed.wait_for_state(job, *OVER) == "COMPLETED"
    assert bed.shown(job, "Restarts") == "0"
    assert "Timeout (0:00:30)!" in log_of(run, job), "no stacks of the hang"
    assert log_of(run, job).count("training from step") == 2
    assert losses(run) == losses(jobs.folder / "quiet") and samples(run) == samples(jobs.folder / "quiet")


def test_a_chain_starts_each_stage_from_the_former_and_exports_the_last(bed, jobs):
    first, second, export = jobs.chain
    assert bed.wait_for_state(export, *OVER) == "COMPLETED"
    assert bed.state(first) == bed.state(second) == "COMPLETED"
    align, tune = losses(jobs.folder / "digits_tiny"), losses(jobs.folder / "digits_tiny_pre")
    assert tune[1] < align[2] < align[1], "the second stage does not start from the first one's weights"
    assert (jobs.folder / "digits_tiny_pre" / "hf" / "config.json").is_file()


def test_a_sweep_trains_every_point_in_a_directory_of_its_own(bed, jobs):
    for task in (0, 1):
        assert bed.wait_for_state(f"{jobs.sweep}_{task}", *OVER) == "COMPLETED"
    first, second = (losses(jobs.folder / f"tried-seed-{seed}") for seed in (1, 2))
    assert first.keys() == second.keys() == {1, 2, 3} and first[1] != second[1]
    assert (jobs.folder / "tried" / "slurm" / f"{jobs.sweep}_1.log").is_file()


def test_a_scaling_study_is_submitted_and_collected(bed, jobs):
    for job in jobs.scaled:
        assert bed.wait_for_state(job, *OVER) == "COMPLETED"
    scale([*_scaled(jobs.folder), "action=collect"])
    points = json.loads((jobs.folder / "scaled" / "results.json").read_text())["points"]
    assert [point["source"] for point in points] == ["measured", "measured"]
    for point in points:
        run = jobs.folder / "scaled" / "runs" / point["name"]
        assert losses(run).keys() == {1, 2, 3} and point["quality"]["lm/loss"] == losses(run)[3]
        assert point["step_seconds"] > 0 and ("pre/cosine" in point["quality"]) == ("-pre-" in point["name"])


def test_a_loss_that_is_not_finite_ends_the_job_for_good_and_cancels_what_waits_for_it(bed, jobs):
    first, second = jobs.diverging
    assert bed.wait_for_state(first, *OVER) == "FAILED"
    assert bed.shown(first, "Restarts") == "0"
    assert "are not finite: lower optim.lr" in log_of(jobs.folder / "diverging" / "digits_tiny", first)
    bed.wait_for_state(second, "CANCELLED", seconds=60)


def test_the_script_written_by_hand_trains(bed, jobs):
    assert bed.wait_for_state(jobs.by_hand, *OVER) == "COMPLETED", (jobs.folder / "by_hand.log").read_text()
    assert losses(jobs.folder / "by_hand").keys() == {1, 2, 3}
