"""A composed run as the text of an sbatch script. Every size follows from the configuration."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import recipes
from nemo_pre.config.derived import world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ClusterConfig

BODY = Path(__file__).with_name("job.sh")
# Since Slurm 22.05 a step does not take over how many cores the job has asked for a task.
CORES_OF_STEPS = '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK'


@dataclass(frozen=True)
class Job:
    """One script.

    Attributes:
        path: where it is kept, beside the run's logs.
        trains: the folders of the runs it trains: one, or one for each task of an array.
    """

    name: str
    path: Path
    script: str
    trains: tuple[Path, ...] = ()


def training_job(config: RunConfig, words: Sequence[str]) -> Job:
    """The job that runs ``nemo-pre train WORDS``, of which ``config`` is composed."""
    logs = Path(config.output_dir) / "slurm"
    lines = [*_training_header(config, _log(logs, "%j.log")), *_surroundings(config.cluster), *_what(config, words)]
    script = "\n".join([*lines, *_how(config), "", BODY.read_text()])
    return Job(config.name, logs / "train.sbatch", script, (Path(config.output_dir),))


def sweep_job(name: str, runs: Mapping[str, tuple[RunConfig, Sequence[str]]], logs: Path) -> Job:
    """An array with one task per run; all have the sizes of the first.

    Args:
        runs: by a label for people, the run and the words that give it.
        logs: where the script and Slurm's own output go.
    """
    first, _ = next(iter(runs.values()))
    header = _training_header(first, _log(logs, "%A_%a.log"), name, f"#SBATCH --array=0-{len(runs) - 1}")
    cases = ["case $SLURM_ARRAY_TASK_ID in"]
    for index, (label, (config, words)) in enumerate(runs.items()):
        cases += [f"  {index}) # {label}", *(f"    {line}" for line in _what(config, words)), "    ;;"]
    lines = [*header, *_surroundings(first.cluster), *cases, "esac", *_how(first), "", BODY.read_text()]
    folders = tuple(Path(config.output_dir) for config, _ in runs.values())
    return Job(name, logs / "train.sbatch", "\n".join(lines), folders)


def command_job(config: RunConfig, verb: str, words: Sequence[str]) -> Job:
    """A job of one task that runs ``nemo-pre VERB WORDS`` behind the run; ``evaluate`` gets a GPU."""
    name, logs = f"{config.name}-{verb}", Path(config.output_dir) / "slurm"
    gpus = 1 if verb == "evaluate" and config.platform != "cpu" else 0
    header = _header(config.cluster, name, _log(logs, f"{verb}-%j.log"), nodes=1, tasks=1, gpus=gpus)
    command = ["srun", *_srun_options(config.cluster), _python(config.cluster), "-m", "nemo_pre.cli", verb, *words]
    lines = [*header, *_surroundings(config.cluster), "set -euo pipefail", shlex.join(command)]
    return Job(name, logs / f"{verb}.sbatch", "\n".join(lines) + "\n")


# --- the parts of a script ------------------------------------------------------------------------------------------


def _training_header(config: RunConfig, log: Path, name: str | None = None, *more: str) -> list[str]:
    cluster = config.cluster
    tasks = world_size(config.parallel) // cluster.nodes
    gpus = tasks if config.platform != "cpu" else 0
    header = _header(cluster, name or _listed_name(config), log, cluster.nodes, tasks, gpus)
    return [*header, f"#SBATCH --signal=B:USR1@{cluster.warning_seconds}", "#SBATCH --requeue", *more]


def _listed_name(config: RunConfig) -> str:
    """What queue listings show: the run's name, which says model, encoder and stage, with its size and precision."""
    unit = "rank" if config.platform == "cpu" else "gpu"
    return f"{config.name}_{world_size(config.parallel)}{unit}_{config.precision.name}"


def _header(cluster: ClusterConfig, name: str, log: Path, nodes: int, tasks: int, gpus: int) -> list[str]:
    options = {
        "job-name": name.replace("\n", " "),
        "nodes": nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": gpus or None,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.memory_per_node,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time_limit,
        "exclude": ",".join(cluster.exclude) or None,
        "open-mode": "append",
        "output": log,
    }
    lines = [f"#SBATCH --{key}={_for_sbatch(value)}" for key, value in options.items() if value is not None]
    return ["#!/usr/bin/env bash", *lines, *(f"#SBATCH {option}" for option in cluster.sbatch_options)]


def _log(folder: Path, name: str) -> Path:
    """Where Slurm writes; in the folder's own name a % is no pattern."""
    return Path(str(folder).replace("%", "%%")) / name


def _for_sbatch(value: object) -> str:
    """A value as sbatch reads it behind ``#SBATCH``: blanks and # end it unless it is in quotes."""
    text = str(value)
    return text if re.fullmatch(r"[\w%+,./:=@^~-]*", text, re.ASCII) else shlex.quote(text)


def _surroundings(cluster: ClusterConfig) -> list[str]:
    # Sites may keep the submitting shell's variables from a job, which composes the run again.
    own = os.environ.get(recipes.OWN_VARIABLE)
    environment = {recipes.OWN_VARIABLE: os.path.abspath(own)} if own else {}
    environment |= cluster.environment
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return ["", CORES_OF_STEPS, *cluster.setup, *exports]


def _what(config: RunConfig, words: Sequence[str]) -> list[str]:
    return [f"RUN_DIR={shlex.quote(str(config.output_dir))}", f"WORDS=({shlex.join(words)})"]


def _how(config: RunConfig) -> list[str]:
    cluster = config.cluster
    gpus = world_size(config.parallel) // cluster.nodes if config.platform != "cpu" else 0
    health = [str(config.output_dir), str(gpus), f"{cluster.min_free_gb:g}", f"{cluster.min_write_mb_s:g}"]
    return [
        f"PYTHON={shlex.quote(_python(cluster))}",
        f"SRUN=({shlex.join(_srun_options(cluster))})",
        f"HEALTH=({shlex.join(health) if cluster.health_check else ''})",
        f"ALL_REDUCE_SECONDS={120 if cluster.all_reduce_check else 0} WARNING_SECONDS={cluster.warning_seconds}",
        f"MAX_FAILURES={cluster.max_failures} FT_RESTARTS={cluster.ft_restarts}",
    ]


def _python(cluster: ClusterConfig) -> str:
    return cluster.python or ("python3" if cluster.container_image else sys.executable)


def _srun_options(cluster: ClusterConfig) -> list[str]:
    """Ranks are counted node by node; pyxis starts them in the container."""
    options = ["--distribution=block"]
    if cluster.container_image:
        here = os.getcwd()
        mounts = ",".join([f"{here}:{here}", *cluster.container_mounts])
        options += [f"--container-image={cluster.container_image}", f"--container-mounts={mounts}"]
        options += [f"--container-workdir={here}"]
    return options
