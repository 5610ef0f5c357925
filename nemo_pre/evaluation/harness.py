"""Running lmms-eval: which interpreter has it, what it knows of tasks, and one process per task."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pre.evaluation.task_index import MARK
from nemo_pre.launch.leash import leashed

# What the command line below says itself.
SET_BY_US = ("--model", "--model_args", "--tasks", "--output_path", "--include_path", "--log_samples", "--config")
HAVE_AN_OPTION = ("--limit", "--batch_size", "-b", "--device", "--num_fewshot")
INSTALL = "pip install 'nemo-pre[eval]' (lmms-eval 0.7.3 or newer), or name an interpreter that has it: python=PATH"


@dataclass(frozen=True)
class Harness:
    """How lmms-eval is run: by which interpreter, with its options; ``online`` may download data."""

    python: str = sys.executable
    batch_size: int = 1
    device: str | None = None
    limit: int | float | None = None
    num_fewshot: int | None = None
    processes: int = 1
    flags: str = ""
    online: bool = False

    def __post_init__(self) -> None:
        for word in shlex.split(self.flags):
            name = word.partition("=")[0]
            if name in SET_BY_US:
                raise ValueError(f"flags may not hold {name}, which nemo-pre evaluate sets itself: leave it out.")
            if name in HAVE_AN_OPTION:
                option = {"-b": "batch_size"}.get(name, name.lstrip("-"))
                raise ValueError(f"flags may not hold {name}: give {option}=VALUE instead.")

    def settings(self) -> dict[str, Any]:
        """The harness's settings that change the scores."""
        return {"limit": self.limit, "num_fewshot": self.num_fewshot, "flags": self.flags}


def version(harness: Harness) -> str:
    """The version of lmms-eval that the harness's interpreter has.

    Raises:
        ValueError: the interpreter does not run, or does not have it.
    """
    program = "import importlib.metadata as m; print(m.version('lmms-eval'))"
    try:
        done = subprocess.run([harness.python, "-c", program], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(
            f"python={harness.python} does not run ({error.strerror}): name a Python interpreter."
        ) from error
    if done.returncode:
        raise ValueError(f"{harness.python} has no lmms-eval: {INSTALL}.")
    return done.stdout.split()[-1]


def index_tasks(harness: Harness, tasks: list[str], include: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Each task's leaves as :mod:`nemo_pre.evaluation.task_index` describes them.

    Raises:
        ValueError: a task is unknown, or this lmms-eval came without tasks.
    """
    with _environment(harness) as environment:
        done = subprocess.run(
            [
                harness.python,
                "-m",
                "nemo_pre.evaluation.task_index",
                str(include.resolve()) if include else "",
                *tasks,
            ],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    answer = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(MARK)), None)
    index: dict[str, Any] = json.loads(answer.removeprefix(MARK)) if answer else {"known": 0}
    if index["known"] <= (include is not None):
        # The wheels of 0.7 to 0.7.2 lack the tasks or the files that these include.
        reason = "knows no tasks" if answer else f"cannot list its tasks ({_last_error(done.stdout + done.stderr)})"
        raise ValueError(f"lmms-eval {version(harness)} of {harness.python} {reason}: {INSTALL}.")
    if index["unknown"]:
        raise ValueError(
            f"lmms-eval {version(harness)} has no task {', '.join(index['unknown'])}: see "
            f"{harness.python} -m lmms_eval --tasks list."
        )
    described: dict[str, list[dict[str, Any]]] = index["tasks"]
    return described


def run_task(harness: Harness, model: Path, task: str, directory: Path, include: Path | None) -> Path:
    """Run one task; lmms-eval's files go to ``directory``, what it prints to ``directory/log.txt``.

    Returns:
        lmms-eval's results.

    Raises:
        ValueError: it ended without results, which it does with exit code 0 too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    with _environment(harness) as environment, log.open("w") as output:
        # Some tasks write a submission to the current directory.
        subprocess.run(
            leashed(command(harness, model, task, directory, include)),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=directory,
            check=False,
        )
    results = sorted(directory.rglob("*_results.json"))
    if not results:
        raise ValueError(f"{task} ended without results: {_last_error(log.read_text())}; see {log}.")
    return results[-1]


def command(harness: Harness, model: Path, task: str, directory: Path, include: Path | None) -> list[str]:
    """The command line of lmms-eval.

    Raises:
        ValueError: the model's path cannot be written in lmms-eval's list of arguments.
    """
    if "," in str(model.resolve()):
        raise ValueError(f"{model.resolve()} has a comma in it, which lmms-eval cannot take: rename it.")
    start = [harness.python, "-m", "lmms_eval"]
    if harness.processes > 1:
        workers = f"--nproc-per-node={harness.processes}"
        start = [harness.python, "-m", "torch.distributed.run", "--standalone", workers, "-m", "lmms_eval"]
    words = [*start, "--model", "exported_vlm", "--model_args", f"pretrained={model.resolve()}", "--tasks", task]
    words += ["--output_path", str(directory.resolve()), "--log_samples", "--batch_size", str(harness.batch_size)]
    if include is not None:
        words += ["--include_path", str(include.resolve())]
    for name in ("device", "limit", "num_fewshot"):
        if getattr(harness, name) is not None:
            words += [f"--{name}", str(getattr(harness, name))]
    return words + shlex.split(harness.flags)


@contextmanager
def _environment(harness: Harness) -> Iterator[dict[str, str]]:
    """The environment of this process with our package alone: the other interpreter has its own of everything else."""
    import nemo_pre

    with tempfile.TemporaryDirectory(prefix="nemo-pre-") as folder:
        Path(folder, "nemo_pre").symlink_to(Path(nemo_pre.__file__).parent, target_is_directory=True)
        environment = {**os.environ, "LMMS_EVAL_PLUGINS": "nemo_pre.evaluation", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        environment |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "0" if harness.online else "1"}
        yield environment


def _last_error(text: str) -> str:
    """The line of a log that most likely says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    errors = [line for line in lines if "Error" in line and not line.startswith("File ")]
    return (errors or lines)[-1][:300]
