"""Evaluating a training run's checkpoints beside it, so that its ranks never stop for it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from nemo_pre.evaluation.results import TaskResult
from nemo_pre.options import Count, CountOrNone, FreeText, PathText, Positive, Rule
from nemo_pre.run_files.checkpoints import numbered_checkpoints
from nemo_pre.run_files.json_files import check_type, read_json_lines

RECORD = "evaluations.jsonl"


def evaluate_run(
    run: PathText,
    suite: str = "digits",
    tasks: str | None = None,
    poll_seconds: Positive = 60.0,
    follow: bool = True,
    keep_exports: bool = False,
    data: PathText = "data/digits",
    batch_size: Count = 1,
    device: str | None = None,
    limit: Count | Annotated[float, Rule(above=0)] | None = None,
    num_fewshot: CountOrNone | None = None,
    processes: Count = 1,
    flags: FreeText = "",
    python: PathText | None = None,
    missing: str = "refuse",
) -> None:
    """Export and evaluate each checkpoint of a run as it appears, until the run's last step; training goes on.

      nemo-pre watch runs/NAME suite=digits

    Each evaluation is a line of runs/NAME/evaluations.jsonl and a folder runs/NAME/evaluations/step=N; a step that has
    a line is not evaluated again. follow=false ends when every checkpoint that is there has been evaluated;
    keep_exports=true keeps the exported directories, runs/NAME/exports/step=N. The other options are those of an
    evaluation.
    """
    from nemo_pre.evaluation.evaluate import evaluate
    from nemo_pre.huggingface.exporter import export_checkpoint

    def evaluate_export(exported: str, out: str) -> list[TaskResult]:
        return evaluate(
            exported,
            suite,
            tasks,
            out=out,
            data=data,
            batch_size=batch_size,
            device=device,
            limit=limit,
            num_fewshot=num_fewshot,
            processes=processes,
            flags=flags,
            python=python,
            missing=missing,
        )

    watch(Path(run), export_checkpoint, evaluate_export, poll_seconds, follow, keep_exports)


def watch(
    run: Path,
    export: Callable[[str, str], Any],
    evaluate: Callable[[str, str], list[TaskResult]],
    poll_seconds: float = 60.0,
    follow: bool = True,
    keep_exports: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """``export(checkpoint, out)`` writes a directory, ``evaluate(directory, out)`` evaluates it.

    Raises:
        ValueError: ``run`` is not a run's directory, or an export or evaluation failed; what was done stays recorded.
    """
    last_step = _last_step(run)
    while True:
        done = evaluated_steps(run)
        waiting = {step: path for step, path in complete_checkpoints(run).items() if step not in done}
        for step, checkpoint in sorted(waiting.items()):
            _evaluate_step(run, step, checkpoint, export, evaluate, keep_exports)
        if not follow or last_step in evaluated_steps(run):
            return
        if not waiting:
            sleep(poll_seconds)


def complete_checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints that have been written to their end, their config.yaml too, by step."""
    finished = numbered_checkpoints(run / "checkpoints")
    return {step: path for step, path in finished.items() if (path / "config.yaml").is_file()}


def evaluated_steps(run: Path) -> set[int]:
    file = run / RECORD
    if not file.is_file():
        return set()
    steps = set()
    for where, record in read_json_lines(file, "a run whose evaluations can be read"):
        check_type(record.get("step"), int, f"{where}: 'step'")
        steps.add(record["step"])
    return steps


def _last_step(run: Path) -> int:
    import yaml

    try:
        return int(yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run} is not a run's directory: it needs a config.yaml with trainer.max_steps.") from error


def _evaluate_step(
    run: Path,
    step: int,
    checkpoint: Path,
    export: Callable[[str, str], Any],
    evaluate: Callable[[str, str], list[TaskResult]],
    keep_exports: bool,
) -> None:
    exported = run / "exports" / checkpoint.name
    shutil.rmtree(exported, ignore_errors=True)  # of a watcher that was ended in between
    try:
        export(str(checkpoint), str(exported))
    except (OSError, ValueError):
        if checkpoint.exists():
            raise
        # The run keeps its newest checkpoints only.
        print(f"step {step}: its checkpoint was removed before it was exported", file=sys.stderr, flush=True)
        return
    results = evaluate(str(exported), str(run / "evaluations" / checkpoint.name))
    scores = {f"{result.task}/{metric}": value for result in results for metric, value in result.metrics.items()}
    with (run / RECORD).open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time(), "scores": scores}) + "\n")
    if not keep_exports:
        shutil.rmtree(exported)
