"""Scores of tasks: read from lmms-eval, kept for the next time, and set beside the papers'."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_pre.evaluation.published import Published
from nemo_pre.evaluation.suites import BENCHMARKS, SUITES, benchmarks_of


@dataclass(frozen=True)
class TaskResult:
    """``metrics`` and ``counts`` (questions) by lmms-eval's names of the metrics; empty, with a ``note``, where the
    task was skipped or failed. ``key`` says what was evaluated and how: equal keys give equal results."""

    task: str
    key: dict[str, Any]
    metrics: dict[str, float]
    counts: dict[str, int]
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Row:
    """``ours``, ``baseline`` and ``regularized`` in the papers' scale; None where there is no number."""

    label: str
    task: str
    metric: str
    ours: float | None
    questions: int | None
    baseline: float | None
    regularized: float | None
    note: str


# --- a task ---------------------------------------------------------------------------------------------------------


def read_results(file: Path, task: str, key: dict[str, Any], seconds: float) -> TaskResult:
    """A task's result, from lmms-eval's ``*_results.json`` and, for the number of questions behind a metric, its
    samples.

    Raises:
        ValueError: there is no number in it.
    """
    raw = json.loads(file.read_text())
    single = task in raw["results"]
    # Of a group each member by its name; of a task, or a group with a score of its own, just the metric.
    metrics = {
        metric if name == task else f"{name}/{metric}": float(value)
        for name, values in raw["results"].items()
        for metric, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in metric
        if metric not in ("samples", "sample_len")
    }
    if not metrics:
        raise ValueError(f"{task} has no numbers in {file}: see what lmms-eval said in log.txt beside it.")
    total = sum(counts["effective"] for counts in raw.get("n-samples", {}).values())
    answered = _questions_by_metric(file, task) if single else {}
    counts = {metric: answered.get(metric.split(",")[0], int(total)) for metric in metrics}
    return TaskResult(task, key, metrics, counts, seconds)


def _questions_by_metric(file: Path, task: str) -> dict[str, int]:
    """How many of the samples that lmms-eval wrote beside its results enter each metric."""
    found: dict[str, int] = {}
    for path in file.parent.glob(file.name.replace("_results.json", f"_samples_{task}.jsonl")):
        with path.open() as lines:
            for line in lines:
                for name in json.loads(line):
                    found[name] = found.get(name, 0) + 1
    return found


def stored_result(file: Path, key: dict[str, Any]) -> TaskResult | None:
    """The result of an earlier run, if it is of the same model, data and settings."""
    try:
        result = TaskResult(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return result if result.key == key and result.metrics else None


def store_result(file: Path, result: TaskResult) -> None:
    file.write_text(json.dumps(asdict(result), indent=2) + "\n")


# --- the table ------------------------------------------------------------------------------------------------------


def table_rows(results: list[TaskResult], suite: str | None, published: Published | None) -> list[Row]:
    """A suite's benchmarks in its order, or every number of the tasks."""
    by_task = {result.task: result for result in results}
    if suite is not None:
        chosen = [BENCHMARKS[name] for name in SUITES[suite] if BENCHMARKS[name].task in by_task]
    else:
        chosen = [benchmark for result in results for benchmark in benchmarks_of(result.task)]
    rows = []
    for benchmark in chosen:
        result = by_task[benchmark.task]
        value = result.metrics.get(benchmark.metric)
        note = result.note or ("" if value is not None else "no question of this kind")
        rows.append(
            Row(
                benchmark.label,
                benchmark.task,
                benchmark.metric,
                None if value is None else value * benchmark.scale,
                result.counts.get(benchmark.metric),
                published.baseline.get(benchmark.name) if published else None,
                published.regularized.get(benchmark.name) if published else None,
                note,
            )
        )
    known = {(benchmark.task, benchmark.metric) for benchmark in chosen}
    for result in results if suite is None else []:
        others = {metric: value for metric, value in result.metrics.items() if (result.task, metric) not in known}
        for metric, value in others.items():
            rows.append(Row(result.task, result.task, metric, value, result.counts.get(metric), None, None, ""))
        if result.note and not benchmarks_of(result.task):
            rows.append(Row(result.task, result.task, "", None, None, None, None, result.note))
    return rows


def markdown(rows: list[Row], model: Path, published: Published | None, remarks: list[str]) -> str:
    columns = ["benchmark", "metric", "ours", "n", "note"]
    if published is not None:
        columns[4:4] = [f"{published.paper}'s baseline", f"+ {published.paper}"]
    lines = [f"# {model}", "", _line(columns), _line(["---"] * len(columns))]
    for row in rows:
        cells = [row.label, row.metric.split(",")[0], _number(row.ours), _number(row.questions), row.note]
        if published is not None:
            cells[4:4] = [_number(row.baseline), _number(row.regularized)]
        lines.append(_line(cells))
    if published is not None:
        lines += ["", f"Published: {published.model} ({'; '.join(published.sources)})."]
    return "\n".join([*lines, *([""] if remarks else []), *remarks]) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _number(value: float | None) -> str:
    """The value to two places, as the papers print."""
    return "–" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")
