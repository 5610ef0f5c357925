"""``nemo-pre evaluate``: from an exported directory to a table beside the papers' numbers."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from nemo_pre.evaluation.cached_data import DataSet, how_to_get, is_cached
from nemo_pre.evaluation.digits import TASK as DIGITS
from nemo_pre.evaluation.digits import data_fingerprint, write_digits_task
from nemo_pre.evaluation.fingerprint import model_fingerprint
from nemo_pre.evaluation.harness import Harness, index_tasks, run_task, version
from nemo_pre.evaluation.published import published_row
from nemo_pre.evaluation.results import TaskResult, markdown, read_results, store_result, stored_result, table_rows
from nemo_pre.evaluation.suites import benchmarks_of, suite_tasks
from nemo_pre.options import Count, CountOrNone, FreeText, PathText, Rule

MISSING = ("refuse", "skip", "download")


def evaluate(
    model: PathText,
    suite: str = "pre",
    tasks: str | None = None,
    out: PathText | None = None,
    data: PathText = "data/digits",
    batch_size: Count = 1,
    device: str | None = None,
    limit: Count | Annotated[float, Rule(above=0)] | None = None,
    num_fewshot: CountOrNone | None = None,
    processes: Count = 1,
    flags: FreeText = "",
    python: PathText | None = None,
    missing: str = "refuse",
    again: bool = False,
    published: str | None = None,
) -> list[TaskResult]:
    """Evaluate an exported model with lmms-eval and write a table beside the papers' numbers.

      nemo-pre evaluate HF_DIR suite=pre                  the PRe paper's benchmarks; laver; digits
      nemo-pre evaluate HF_DIR tasks=gqa,pope limit=100   lmms-eval's tasks by name

    out (HF_DIR-evaluation) gets table.md, results.json and a folder per task; a task that is there for the same model,
    data and settings is not run again unless again=true. data is where the prepared digit scenes lie. device, limit,
    batch_size, num_fewshot and anything in flags="--gen_kwargs ..." go to lmms-eval; processes shares the questions
    out over GPUs. python is the interpreter that has lmms-eval, if it is not this one. Data sets that are not in the
    local cache are listed before anything loads and refused; missing=skip leaves their tasks out and missing=download
    fetches them. published names a row of nemo_pre/evaluation/published.yaml to compare with.

    Raises:
        ValueError: lmms-eval, a task or data are missing, or a task failed; the table has the others.
    """
    if missing not in MISSING:
        raise ValueError(f"missing={missing} is unknown: choose one of {', '.join(MISSING)}.")
    directory = Path(model)
    fingerprint = model_fingerprint(directory)
    names = list(dict.fromkeys(tasks.split(","))) if tasks else suite_tasks(suite)
    row = published_row(published, None if tasks else suite)
    harness = Harness(
        python or sys.executable, batch_size, device, limit, num_fewshot, processes, flags, missing == "download"
    )
    lmms_eval = version(harness)
    target = Path(out) if out else directory.resolve().with_name(directory.resolve().name + "-evaluation")
    keys = {name: _key(name, fingerprint, harness, data) for name in names}
    done = {} if again else {name: stored_result(target / name / "result.json", keys[name]) for name in names}
    results = {name: result for name, result in done.items() if result is not None}
    remaining = [name for name in names if name not in results]
    if results:
        _say(f"already in {target}: {', '.join(results)}")
    include = write_digits_task(data, target / "digits-data") if DIGITS in remaining else None
    index = index_tasks(harness, remaining, include) if remaining else {}
    for name, sets in _missing_data(index, missing).items():
        lacking = ", ".join(_shown(each) for each in sets)
        results[name] = TaskResult(name, keys[name], {}, {}, note=f"skipped: {lacking} is not here")
    for name in remaining:
        if name not in results:
            results[name] = _run(harness, directory, name, keys[name], target / name, include)
    ordered = [results[name] for name in names]
    table = _write_table(ordered, directory, fingerprint, lmms_eval, None if tasks else suite, row, index, target)
    print(table, end="", flush=True)
    print(f"\n{target}; next: nemo-pre report RUN report.html model={model}", flush=True)
    failed = [result for result in ordered if result.note.startswith("failed")]
    if failed:
        raise ValueError(f"{len(failed)} of {len(names)} tasks failed: {failed[0].note.removeprefix('failed: ')}")
    return ordered


def _key(task: str, fingerprint: str, harness: Harness, data: str) -> dict[str, Any]:
    key = {"model": fingerprint, **harness.settings()}
    return {**key, "data": data_fingerprint(data)} if task == DIGITS else key


def _missing_data(index: dict[str, list[dict[str, Any]]], missing: str) -> dict[str, list[DataSet]]:
    """The data sets of each task that are not in the cache; none where they may be downloaded. Says what judges.

    Raises:
        ValueError: there are some, and they may not be left out.
    """
    judged = [name for name, leaves in index.items() if _asks_a_model(name, leaves)]
    if judged:
        _say(
            f"{', '.join(judged)}: a language model judges answers, which needs a network and OPENAI_API_KEY (or "
            f"API_TYPE=azure and AZURE_API_KEY); without it lmms-eval guesses or leaves these undecided."
        )
    needed = {name: [(path, part) for leaf in leaves for path, part in leaf["data"]] for name, leaves in index.items()}
    lacking = {name: [each for each in dict.fromkeys(sets) if not is_cached(each)] for name, sets in needed.items()}
    lacking = {name: sets for name, sets in lacking.items() if sets}
    if not lacking:
        return {}
    lines = [f"{name}: {', '.join(map(_shown, sets))}" for name, sets in lacking.items()]
    _say("Data that are not here:\n  " + "\n  ".join(lines))
    if missing == "download":
        return {}
    _say(how_to_get(list(dict.fromkeys(each for sets in lacking.values() for each in sets))))
    if missing == "refuse":
        raise ValueError(
            f"{len(lacking)} of {len(index)} tasks lack their data: put them there as said above, or leave these "
            f"tasks out with missing=skip."
        )
    return lacking


def _asks_a_model(name: str, leaves: list[dict[str, Any]]) -> bool:
    """We know it of the papers' benchmarks, and guess it from the code of others."""
    known = benchmarks_of(name)
    return any(benchmark.judge for benchmark in known) if known else any(leaf["asks_a_model"] for leaf in leaves)


def _run(
    harness: Harness, model: Path, task: str, key: dict[str, Any], directory: Path, include: Path | None
) -> TaskResult:
    """One task in a process of its own, so that one that fails costs no other."""
    import shutil

    shutil.rmtree(directory, ignore_errors=True)  # what an interrupted run left is not this run's result
    _say(f"{task}: running, see {directory / 'log.txt'}")
    started = time.monotonic()
    try:
        file = run_task(harness, model, task, directory, include)
        result = read_results(file, task, key, time.monotonic() - started)
    except ValueError as error:
        return TaskResult(task, key, {}, {}, time.monotonic() - started, f"failed: {error}")
    store_result(directory / "result.json", result)
    _say(f"{task}: done in {result.seconds:.0f} s")
    return result


def _write_table(
    results: list[TaskResult],
    model: Path,
    fingerprint: str,
    lmms_eval: str,
    suite: str | None,
    row: Any,
    index: dict[str, list[dict[str, Any]]],
    target: Path,
) -> str:
    rows = table_rows(results, suite, row)
    remarks = [f"lmms-eval {lmms_eval}, model {fingerprint}, {len(results)} tasks."]
    skipped = [result.task for result in results if result.note.startswith("skipped")]
    if skipped:
        remarks.append(f"Left out for lack of data: {len(skipped)} ({', '.join(skipped)}).")
    judged = [result.task for result in results if _asks_a_model(result.task, index.get(result.task, []))]
    if judged:
        remarks.append(f"Judged by a language model: {', '.join(judged)}.")
    limited = sorted({str(result.key["limit"]) for result in results if result.key["limit"] is not None})
    if limited:
        remarks.append(f"Only part of each task (limit={', '.join(limited)}): not comparable with published numbers.")
    table = markdown(rows, model, row, remarks)
    target.mkdir(parents=True, exist_ok=True)
    (target / "table.md").write_text(table)
    summary = {
        "model": str(model),
        "fingerprint": fingerprint,
        "lmms_eval": lmms_eval,
        "published": row.name if row else None,
        "rows": [asdict(each) for each in rows],
        "tasks": [asdict(each) for each in results],
    }
    (target / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    return table


def _shown(data: DataSet) -> str:
    return data[0] + (f" ({data[1]})" if data[1] else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
