"""The test bed from Python: start it, submit runs, look at jobs, and break things."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch")
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"


def missing_tools() -> list[str]:
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [tool for tool in TOOLS if shutil.which(tool, path=path) is None]


class TestBed:
    """A Slurm of ``nodes`` virtual nodes in ``directory``."""

    __test__ = False  # for pytest

    def __init__(self, directory: Path, nodes: int = 3) -> None:
        self.directory = directory
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment |= {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "PYTHONPATH": str(REPOSITORY)}
        self.environment |= {"SLURM_CONF": str(directory / "slurm.conf"), "CUDA_VISIBLE_DEVICES": ""}
        for name in ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS"):
            self.environment.pop(name, None)

    def start(self) -> None:
        command = [str(HERE / "start.sh"), str(self.directory), str(len(self.nodes))]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)

    def stop(self) -> None:
        subprocess.run([str(HERE / "stop.sh"), str(self.directory)], check=False, capture_output=True, timeout=60)

    def command(self, *words: str) -> str:
        """Standard output of a Slurm command."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, verb: str = "submit") -> list[str]:
        """``nemo-pre submit``, or another verb that submits, in a process of its own; the jobs' numbers."""
        done = subprocess.run(
            [sys.executable, "-m", "nemo_pre.cli", verb, *words],
            env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        jobs = (line for line in done.stdout.splitlines() if "job(s) in the queue" not in line)  # and what comes next
        return [line.split()[0] for line in jobs]

    def submit_by_hand(self, log: Path, node: str, *words: str) -> str:
        """``sbatch slurm/train.sbatch`` with one task; the job's number."""
        environment = {"PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "lo", "MIN_FREE_GB": "0", "MIN_WRITE_MB_S": "0"}
        options = [f"--output={log}", f"--nodelist={node}", "--nodes=1", "--ntasks-per-node=1"]
        done = subprocess.run(
            ["sbatch", "--parsable", *options, "slurm/train.sbatch", *words],
            env={**self.environment, **environment}, cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def shown(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``.

        Asked several times a second for an hour, a controller now and then breaks a connection off ("Zero Bytes were
        transmitted or received" in its log); that is no fault of the job.
        """
        for attempt in range(3):
            try:
                text = self.command("scontrol", "show", "job", job, "--oneliner")
                break
            except AssertionError:
                if attempt == 2:
                    raise
                time.sleep(1)
        found = re.search(rf"(?:^|\s){name}=(\S+)", text)
        assert found is not None, name
        return found[1]

    def state(self, job: str) -> str:
        return self.shown(job, "JobState")

    def wait_for_state(self, job: str, *states: str, seconds: float = 400) -> str:
        wait_for(lambda: self.state(job) in states, seconds, lambda: f"job {job} is {self.state(job)}, not {states}")
        return self.state(job)

    def signal_batch_script(self, job: str, name: str = "USR1") -> None:
        self.command("scancel", "--batch", f"--signal={name}", job)

    def rank_process(self, job: str, rank: int) -> int | None:
        """The process of a rank of a running job; not one that it has forked."""
        found: dict[int, int] = {}  # with its parent
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                words = (directory / "cmdline").read_bytes().split(b"\0")
                if b"nemo_pre.slurm.rank" not in words or b"nvidia_resiliency_ext.fault_tolerance.launcher" in words:
                    continue
                items = (directory / "environ").read_text(errors="replace").split("\0")
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            variables = dict(item.partition("=")[::2] for item in items)
            number = variables.get("RANK", variables.get("SLURM_PROCID"))
            place = (variables.get("SLURM_CONF"), variables.get("SLURM_JOB_ID"), number)
            if words[0].endswith(b"python") and place == (self.environment["SLURM_CONF"], job, str(rank)):
                found[int(directory.name)] = parent
        return next((process for process, parent in found.items() if parent not in found), None)

    def signal_rank(self, job: str, rank: int, number: int = signal.SIGKILL) -> None:
        process = self.rank_process(job, rank)
        assert process is not None, f"rank {rank} of job {job} does not run"
        os.kill(process, number)

    def node_of(self, job: str, index: int) -> str:
        """The job's node with this index."""
        return self.command("scontrol", "show", "hostnames", self.shown(job, "NodeList")).splitlines()[index]

    def fault(self, node: str, what: str) -> None:
        """``crash`` or ``hang`` a node, or bring it ``back``."""
        subprocess.run([str(HERE / "fault.sh"), str(self.directory), node, what], check=True, timeout=60)


def wait_for(condition: Callable[[], bool], seconds: float, complaint: Callable[[], str], every: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(every)


def last_step(run: Path) -> int:
    """Of the steps that are on record."""
    from nemo_pre.run_files.metrics import read_metrics

    file = run / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(file)), default=0) if file.exists() else 0


def losses(run: Path) -> dict[int, float]:
    """By step; a step that is on record twice is an error."""
    from nemo_pre.run_files.metrics import read_metrics

    lines = [line for line in read_metrics(run / "metrics.jsonl") if "lm/loss" in line]
    found = {line["step"]: line["lm/loss"] for line in lines}
    assert len(found) == len(lines), "a step is on record twice"
    return found


def samples(run: Path) -> dict[int, list[str]]:
    """The names of what each step trained on; a step that is on record twice is an error."""
    from nemo_pre.callbacks.sample_record import SAMPLES
    from nemo_pre.run_files.metrics import read_metrics

    lines = read_metrics(run / SAMPLES)
    found = {line["step"]: line["samples"] for line in lines}
    assert len(found) == len(lines), "a step is on record twice"
    return found


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    from nemo_pre.run_files.checkpoints import UNFINISHED

    return any((run / "checkpoints").glob(f"step=*{UNFINISHED}"))


def cut_newest_checkpoint(run: Path) -> int:
    """Halve the largest file of the newest checkpoint; returns its step."""
    from nemo_pre.run_files.checkpoints import numbered_checkpoints

    checkpoints = numbered_checkpoints(run / "checkpoints")
    step = max(checkpoints)
    largest = max(checkpoints[step].rglob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    return step
