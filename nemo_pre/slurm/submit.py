"""``nemo-pre submit``: a run, a chain of runs or a sweep as Slurm jobs."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_pre.config.run import RunConfig
from nemo_pre.config.words import check_spelling
from nemo_pre.run_files import queue
from nemo_pre.run_files.lock import refuse_if_written
from nemo_pre.slurm.render import Job, command_job, sweep_job, training_job

TIME_LIMIT = re.compile(r"\d+-\d+(:\d+){0,2}|\d+:\d+(:\d+)?|infinite", re.IGNORECASE)
SUBMITTED = "slurm/submitted"  # in a run's folder: the number of the job that trains it
COMMANDS = ("export", "evaluate")  # what may follow the runs of a chain
REHEARSE = "rehearse"


def submit(words: Sequence[str]) -> None:
    """Render the jobs that the words of the command line describe, and submit them one behind the other.

    Raises:
        ValueError: an option is unknown or does not fit, or sbatch refuses a job.
        RankFailure: a rehearsal finds a problem; nothing is submitted then.
    """
    request = parse(words)
    jobs = render(request)
    if request.rehearse:
        rehearse_runs(request)
    if request.dry_run:
        for job in jobs:
            print(f"# {job.path}\n{job.script}")
        return
    if shutil.which("sbatch") is None:
        raise ValueError("There is no sbatch on this machine: submit on a login node, or look at it with --dry-run.")
    numbers = submit_chain(jobs)
    logs = jobs[0].path.parent
    print(f"{len(numbers)} job(s) in the queue; next: squeue -j {','.join(numbers)}, and tail -f {logs}/*.log")


def submit_help() -> str:
    return """nemo-pre submit experiment=NAME cluster=SITE [OPTION=VALUE ...] [--dry-run]

Renders sbatch scripts and submits them. Options are those of nemo-pre train; sizes follow from them.
cluster=SITE is a file of recipes/cluster: partition, account, time limit, container, network (ClusterConfig).

  nemo-pre submit experiment=NAME cluster=SITE --dry-run            print the script
  nemo-pre submit chain=[NAME,NAME,export,evaluate] cluster=SITE    each starts when the former has succeeded;
                                                                    export.X=Y, evaluate.X=Y: options of those
  nemo-pre submit experiment=NAME cluster=SITE rehearse=true        nemo-pre rehearse first, here; nothing is submitted
                                                                    where it finds a problem. rehearse.X=Y: its options
  nemo-pre submit experiment=NAME cluster=SITE sweep=optim.lr=1e-4,3e-4    an array; several sweeps: every combination

A job that is preempted, reaches its time limit, or loses a rank or node goes back into the queue and continues from
its newest checkpoint. Logs: OUTPUT_DIR/slurm/JOB.RESTART.log. More: docs/cluster.md."""


@dataclass
class Request:
    """What the words say. ``overrides`` go to every run; ``commands`` holds the options of export and evaluate,
    ``rehearsal`` those of the rehearsal before."""

    overrides: list[str] = field(default_factory=list)
    chain: list[str] = field(default_factory=list)
    sweeps: list[tuple[str, list[str]]] = field(default_factory=list)
    commands: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in COMMANDS})
    dry_run: bool = False
    rehearse: bool = False
    rehearsal: list[str] = field(default_factory=list)


def parse(words: Sequence[str]) -> Request:
    """The request that the words of the command line make.

    Raises:
        ValueError: one sentence on a word that fits nowhere.
    """
    request = Request()
    for word in words:
        name, _, value = word.partition("=")
        verb, _, option = name.partition(".")
        if word in ("--dry-run", "--dry_run"):
            request.dry_run = True
        elif word.startswith("-"):
            raise ValueError(f"'{word}' is not an option of nemo-pre submit: see nemo-pre submit --help.")
        elif name == "chain":
            request.chain = [link.strip() for link in value.strip("[]").split(",") if link.strip()]
        elif name == REHEARSE:
            if value not in ("true", "false"):
                raise ValueError(f"{word} is neither rehearse=true nor rehearse=false.")
            request.rehearse = value == "true"
        elif verb == REHEARSE and option:
            request.rehearsal.append(f"{option}={value}")
        elif name == "sweep":
            request.sweeps.append(_sweep(value))
        elif verb in COMMANDS and option:
            request.commands[verb].append(f"{option}={value}")
        else:
            check_spelling(word, ("chain", "sweep"))
            request.overrides.append(word)
    _check_request(request)
    return request


def _sweep(text: str) -> tuple[str, list[str]]:
    name, _, values = text.partition("=")
    if not name or not all(values.split(",")):
        raise ValueError(f"sweep={text} is not OPTION=VALUE,VALUE: write for example sweep=optim.lr=1e-4,3e-4.")
    return name, values.split(",")


def _check_request(request: Request) -> None:
    if request.chain and request.sweeps:
        raise ValueError("chain and sweep cannot be submitted together: submit the sweep by itself.")
    if request.chain and any(word.startswith("experiment=") for word in request.overrides):
        raise ValueError("experiment= and chain= both name runs: leave experiment= out.")
    runs = [link for link in request.chain if link not in COMMANDS]
    if request.chain and (not runs or request.chain[: len(runs)] != runs):
        raise ValueError(f"chain={','.join(request.chain)} must be experiments, then export and evaluate at most.")
    tail = request.chain[len(runs) :]
    if tail not in ([], ["export"], ["export", "evaluate"]):
        raise ValueError(f"chain={','.join(request.chain)} must end with export, or export,evaluate, or a run.")
    if request.rehearsal and not request.rehearse:
        raise ValueError(f"rehearse.{request.rehearsal[0]} has no effect: add rehearse=true.")
    for verb, options in request.commands.items():
        if options and verb not in tail:
            raise ValueError(f"{verb}.{options[0]} has no effect: put {verb} into chain=.")


# --- from words to jobs ---------------------------------------------------------------------------------------------


def render(request: Request) -> list[Job]:
    """The jobs in their order."""
    if request.sweeps:
        return [_render_sweep(request)]
    if request.chain:
        return _render_chain(request)
    words = with_nodes(request.overrides)
    return [training_job(_checked_run(words, request.dry_run), words)]


def with_nodes(words: Sequence[str], former: RunConfig | None = None) -> list[str]:
    """``cluster.nodes`` follows from the layout where the site says how many devices a node has; a layout of fewer
    ranks takes a part of one.

    Raises:
        ValueError: the words do not give a run, or its ranks do not fill nodes.
    """
    from nemo_pre.config.compose import compose_run
    from nemo_pre.config.derived import world_size

    if any(word.startswith("cluster.nodes=") for word in words):
        return list(words)
    config = compose_run(words, None if former is None else former.model)
    ranks, per_node = world_size(config.parallel), config.cluster.devices_per_node
    if per_node is None:
        return list(words)
    if ranks < per_node:  # a part of a node: Slurm gives the job as many devices as it has ranks
        return [*words, "cluster.nodes=1", "cluster.devices_per_node=null"]
    if ranks % per_node:
        raise ValueError(
            f"The layout's {ranks} ranks do not fill nodes of cluster.devices_per_node={per_node}: change parallel, "
            f"or set cluster.devices_per_node=null and cluster.nodes=N."
        )
    return [*words, f"cluster.nodes={ranks // per_node}"]


def rehearse_runs(request: Request) -> None:
    """Rehearse every run of the request here; of a sweep its first, since all have one layout.

    Raises:
        RankFailure: a rehearsal finds a problem.
    """
    from nemo_pre.rehearsal.rehearse import rehearse

    point = [f"{name}={values[0]}" for name, values in request.sweeps]
    runs = [link for link in request.chain if link not in COMMANDS]
    for first in [[f"experiment={link}"] for link in runs] or [[]]:
        rehearse([*with_nodes([*first, *request.overrides]), *point, *request.rehearsal])


def _render_sweep(request: Request) -> Job:
    overrides = with_nodes(request.overrides)
    base = _checked_run(overrides, options_only=True)
    runs = {}
    for values in itertools.product(*(values for _, values in request.sweeps)):
        point = [f"{name}={value}" for (name, _), value in zip(request.sweeps, values, strict=True)]
        label = "-".join(
            f"{name.rpartition('.')[2]}-{value}" for (name, _), value in zip(request.sweeps, values, strict=True)
        )
        words = [*overrides, *point, f"name={base.name}-{label}"]
        runs[" ".join(point)] = (_checked_run(words, request.dry_run), words)
    configs = [config for config, _ in runs.values()]
    if len({config.output_dir for config in configs}) < len(configs):
        raise ValueError("The runs of a sweep need directories of their own: have ${name} in output_dir.")
    sizes = {(config.cluster.nodes, str(config.parallel)) for config in configs}
    if len(sizes) > 1:
        raise ValueError("The runs of a sweep are one array of equal jobs: do not sweep parallel or cluster.nodes.")
    return sweep_job(base.name, runs, Path(base.output_dir) / "slurm")


def _render_chain(request: Request) -> list[Job]:
    from nemo_pre import cli

    jobs: list[Job] = []
    former: RunConfig | None = None
    for link in request.chain:
        if link in COMMANDS:
            assert former is not None
            exported = str(Path(former.output_dir) / "hf")
            source = [str(Path(former.output_dir) / "checkpoints"), exported] if link == "export" else [exported]
            words = [*source, *request.commands[link]]
            verb = cli.VERBS[link]
            cli.options(cli._resolve(verb.function), words, link, verb.defaults)  # refuses what the verb does not know
            jobs.append(command_job(former, link, words))
            continue
        words = [f"experiment={link}", *request.overrides]
        if former is not None:
            words = [word for word in words if not word.startswith("init_from=")]
            words.append(f"init_from={Path(former.output_dir) / 'checkpoints'}")
        words = with_nodes(words, former)
        config = _checked_run(words, request.dry_run, former)
        if former is not None and config.output_dir == former.output_dir:
            raise ValueError("The runs of a chain need directories of their own: have ${name} in output_dir.")
        jobs.append(training_job(config, words))
        former = config
    return jobs


def _checked_run(words: Sequence[str], options_only: bool, former: RunConfig | None = None) -> RunConfig:
    """Composed and checked as ``nemo-pre train`` would; without a look at files where they need not be.

    Args:
        words: of the command line.
        options_only: nothing is submitted from here. Weights to start from are looked at even so where they lie here.
        former: the run that is queued before, whose checkpoint ``init_from`` is going to be.
    """
    from nemo_pre.checks.memory import missing_gpu
    from nemo_pre.checks.presence import check_encoder_start, check_init_from
    from nemo_pre.checks.run import check_memory, check_options, check_run
    from nemo_pre.config.compose import compose_run
    from nemo_pre.huggingface.start_tower import shipped_towers
    from nemo_pre.run_files.saved_config import check_same_model

    config = compose_run(words, None if former is None else former.model)
    if config.cluster.name == "local":
        raise ValueError(
            "cluster=local is this machine: choose cluster=SITE, a file recipes/cluster/SITE.yaml of yours, or for a "
            "first try slurm_site with cluster.partition=NAME."
        )
    elsewhere = replace(config, dry_run=True)  # the GPUs and the former stage of a chain are not here yet
    asked = missing_gpu(config)
    if asked is not None:
        raise ValueError(asked)
    if options_only:
        check_options(elsewhere)
        check_memory(elsewhere)
        if former is not None:
            check_same_model(config.model, former.model, f"{former.name}, the stage before it,")
        elif config.init_from and Path(config.init_from).expanduser().exists():
            check_init_from(elsewhere)
        elif config.vision_from and (config.vision_from in shipped_towers() or Path(config.vision_from).is_dir()):
            check_encoder_start(elsewhere)
    else:
        check_run(elsewhere, former)
    check_site(config)
    return config


def check_site(config: RunConfig) -> None:
    """Check what Slurm is told of the site.

    Raises:
        ValueError: one sentence on a value of ``cluster`` that Slurm would refuse or misread.
    """
    cluster = config.cluster
    if cluster.time_limit is not None and not TIME_LIMIT.fullmatch(cluster.time_limit):
        raise ValueError(
            f"cluster.time_limit={cluster.time_limit} is not days-hours:minutes:seconds: write it such as "
            f"1-00:00:00, in a file in quotes."
        )
    if not config.resume:
        raise ValueError("resume=false would make a requeued job begin anew: leave resume=true.")
    for option in cluster.sbatch_options:
        if not option.startswith("-"):
            raise ValueError(
                f"cluster.sbatch_options has '{option}': write options as sbatch takes them (--exclusive)."
            )
    if re.search(r"[\\\n]", config.output_dir):
        raise ValueError(
            f"output_dir={config.output_dir!r} has a \\ or a line break, which Slurm's log path cannot have."
        )


# --- submitting -----------------------------------------------------------------------------------------------------


def submit_chain(jobs: Sequence[Job]) -> list[str]:
    """Submit the jobs, each to start when the former has succeeded, and to be cancelled when it cannot any more;
    returns their numbers.

    Raises:
        ValueError: a job that waits or runs, or a process, has the folder of one of the runs, and nothing was
            submitted; or sbatch refused one, and those before it are cancelled.
    """
    for job in jobs:
        for folder in job.trains:
            refuse_busy(folder)
    numbers: list[str] = []
    for job in jobs:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        job.path.write_text(job.script)
        behind = [f"--dependency=afterok:{numbers[-1]}", "--kill-on-invalid-dep=yes"] if numbers else []
        answer = subprocess.run(
            ["sbatch", "--parsable", *behind, str(job.path)], capture_output=True, text=True, check=False
        )
        if answer.returncode:
            if numbers:
                subprocess.run(["scancel", *numbers], check=False)
            reason = answer.stderr.strip().splitlines()
            raise ValueError(f"sbatch refuses {job.path}: {reason[-1] if reason else 'it does not say why'}.")
        numbers.append(answer.stdout.strip().split(";")[0])
        record_job(job, numbers[-1])
        print(f"{numbers[-1]}  {job.name}  {job.path.parent}")
    return numbers


def record_job(job: Job, number: str) -> None:
    """Write the job's number into the folders of the runs it trains; a task of an array is ``NUMBER_TASK``."""
    for task, folder in enumerate(job.trains):
        record = folder / SUBMITTED
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{number}_{task}\n" if len(job.trains) > 1 else f"{number}\n")


def refuse_busy(folder: Path) -> None:
    """Refuse a run's folder that another job or process has.

    Raises:
        ValueError: the job that was submitted for it waits or runs, or somebody writes there.
    """
    record = folder / SUBMITTED
    number = record.read_text().strip() if record.is_file() else ""
    if number and queue.has_queue():
        try:
            state = queue.state_of(number)
        except TimeoutError as error:
            raise ValueError(
                f"Whether job {number}, which was submitted for output_dir={folder}, still waits or runs, Slurm does "
                f"not say ({error}): submit again later."
            ) from error
        if state:
            raise ValueError(
                f"output_dir={folder} has job {number} already, which is {state}: wait for it, end it with scancel "
                f"{number}, or choose another output_dir."
            )
    refuse_if_written(folder)
