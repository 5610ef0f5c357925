"""The batch script among signals that come at any time, around made-up commands of Slurm."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from nemo_pre.slurm.render import BODY
from nemo_pre.slurm.submit import parse, render

COMMANDS = {
    "squeue": "echo RUNNING",
    "sleep": '[ "$1" = 1 ] && exec /bin/sleep 0.01; exec /bin/sleep "$@"',
    "scontrol": """
        case "$1 $2" in
        "show hostnames") echo node1 ;;
        "show node") echo "NodeName=node1 NodeAddr=127.0.0.1 x" ;;
        "requeue 7") # a warning while the controller is slow to answer
            kill -USR1 $(cat batch.pid); /bin/sleep 0.3; touch requeued; kill -TERM $(cat batch.pid) ;;
        esac""",
    "srun": """
        case "$*" in *nemo_pre.slurm.health*) echo node1 is well; exit ;; esac
        trap 'echo heard >> srun.signals' TERM
        kill -TERM $$
        while ! [ -e "$NEMO_PRE_STOP_FILE" ] || ! [ -e enough ]; do /bin/sleep 0.05; done
        echo requeue > "$NEMO_PRE_VERDICT_FILE"
        exit 85""",
}


def script(folder: Path) -> Path:
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    words = ["experiment=digits_tiny", "cluster=slurm_testbed", "parallel=single", "cluster.nodes=1", "--dry-run"]
    (job,) = render(parse([*words, "platform=cpu", f"output_dir={folder / 'run'}"]))
    (folder / "job.sbatch").write_text(job.script)
    return folder / "job.sbatch"


def test_every_signal_is_heard_whenever_it_comes(tmp_path):
    surroundings = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}
    surroundings |= {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}
    with (tmp_path / "log").open("w") as log:
        command = ["bash", str(script(tmp_path))]
        job = subprocess.Popen(command, cwd=tmp_path, env=surroundings, stdout=log, stderr=subprocess.STDOUT)
    (tmp_path / "batch.pid").write_text(str(job.pid))
    ignores = f"/proc/{job.pid}/status"
    while not any(line.startswith("SigCgt") and int(line.split()[1], 16) & 1 << signal.SIGUSR1 - 1
                  for line in Path(ignores).read_text().splitlines()):  # fmt: skip
        time.sleep(0.01)
    delays = random.Random(0)
    for _ in range(400):
        if job.poll() is None:
            job.send_signal(signal.SIGUSR1)
        time.sleep(delays.random() * 0.003)
    (tmp_path / "enough").touch()

    assert job.wait(60) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "unexpected" not in said, said
    assert said.count("asked to stop: the ranks write a checkpoint") == 1, said
    assert "the ranks ended with code 85, verdict requeue" in said, said
    assert (tmp_path / "requeued").exists(), "the job ended before it was back in the queue"
    assert "stopped at a checkpoint: back into the queue" in said, said
    assert (tmp_path / "srun.signals").read_text() == "heard\n"  # a step's srun does not ignore what we do


def test_the_shell_that_hears_signals_substitutes_no_command():
    """A bash that is signalled while it parses one loses the trap."""
    silent, mark, hearing = BODY.read_text().partition("# --- the shell that hears signals")
    assert mark and "\ntrap '' USR1 TERM\n" in silent.partition("say()")[0]
    code = [line.partition(" # ")[0] for line in hearing.splitlines()[1:]]
    assert not [line for line in code if "$(" in line.replace("$((", "") or "`" in line or "<(" in line]
