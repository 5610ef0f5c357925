"""The numbers of the study on a language model that has read: by arm, seed, phase and layer, as JSON.

A phase is when a model was measured: ``start`` (a new projector), ``aligned`` (after the first stage), and a quarter,
a half and the end of the second stage.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pre.report.intervals import Estimate, difference, mean_interval
from nemo_pre.study.arms import Arm
from nemo_pre.study.kept import Kept
from nemo_pre.study.runs import TRAINED, StudyRun
from nemo_pre.study.summary import BY_LAYER, provenance

FORMAT, FORMAT_VERSION = "nemo-pre real study", 2
PHASES = ("start", "aligned", "1/4", "1/2", "end")
OF_OBJECTS = ("concept", "category", "colour", "place")
SAYS_NAME = ("says_name", "says_name_among_10")
LAST_STEPS = 40  # whose median a gradient norm is
TOP_WORDS = 6
PROVENANCE = ("date", "machine", "versions")

Summary = dict[str, Any]


def summarise(arms: Sequence[Arm], runs: Sequence[StudyRun], settings: Mapping[str, Any], kept: Kept) -> Summary:
    """A summary of what is there: of a run that is not finished the phases that are, and of one that is kept its
    numbers as they were."""
    second = [run for run in runs if run.measured]
    found: dict[str, Any] = {}
    for arm in arms:
        seeds = {run.seed: _numbers(run, arm, runs, kept) for run in second if run.arm == arm.name}
        seeds = {seed: phases for seed, phases in seeds.items() if phases["phases"]}
        if seeds:
            found[arm.name] = {
                "label": arm.label,
                "overrides": list(arm.overrides),
                "against": list(arm.against),
                "seeds": {str(seed): phases for seed, phases in seeds.items()},
            }
    finished = [run for run in second if run.is_finished]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **(provenance(finished) if finished else _provenance_of(kept)),
        "settings": dict(settings),
        "labels": {arm.name: arm.label for arm in arms},
        "runs": [
            {
                "arm": run.arm,
                "seed": run.seed,
                "steps": run.steps,
                "done": _done(run, kept),
                "finished": _is_there(run, kept),
            }
            for run in second
        ],
        "arms": found,
    }


def _is_there(run: StudyRun, kept: Kept) -> bool:
    return run.is_finished or kept.has(run)


def _done(run: StudyRun, kept: Kept) -> int:
    return run.steps if _is_there(run, kept) else run.steps_done


def _provenance_of(kept: Kept) -> dict[str, Any]:
    """When, where and with what the runs kept were made."""
    return {name: kept.summary[name] for name in PROVENANCE if name in kept.summary} if kept.summary else {}


def _numbers(run: StudyRun, arm: Arm, runs: Sequence[StudyRun], kept: Kept) -> dict[str, Any]:
    return kept.numbers(run) if kept.has(run) else _second_stage(run, arm, runs)


def _second_stage(run: StudyRun, arm: Arm, runs: Sequence[StudyRun]) -> dict[str, Any]:
    """What is known of a second stage and of what came before it."""
    kind = "random_start" if "random" in arm.name else "start"
    before = {"start": kind, "aligned": arm.first_stage}
    phases = {}
    own = {}
    for step, out in run.diagnosed_at().items():
        if read := _phase(out):
            own[{run.steps: "end", run.steps // 2: "1/2"}.get(step, "1/4")] = read
    answers = _answers(run) if run.directory.is_dir() else {}
    if own:
        for phase, name in before.items():
            earlier = next((each for each in runs if (each.arm, each.seed) == (name, run.seed)), None)
            if earlier is not None and (read := _phase(earlier.diagnosed_at()[earlier.steps])):
                phases[phase] = read
    return {
        "phases": phases | own,
        "answers": answers,
        "training": _training(run) if run.directory.is_dir() else {},
        "seconds": _seconds(run),
        "date": provenance([run])["date"] if run.is_finished else None,
    }


def _seconds(run: StudyRun) -> float | None:
    file = run.directory / TRAINED
    return float(json.loads(file.read_text())["seconds"]) if file.is_file() else None


def _phase(directory: Path) -> dict[str, Any] | None:
    from nemo_pre.diagnostics.results import RESULTS, read_results

    if not (directory / RESULTS).is_file():
        return None
    results = read_results(directory)
    return {
        "layers": {
            str(layer["layer"]): {
                **{name: layer.get(name) for name in BY_LAYER},
                "probes": {task: layer["probe"][task]["accuracy"] for task in layer["probe"]},
                "objects": layer.get("objects", {}),
            }
            for layer in results["layers"]
        },
        "says": [[word["text"], word["share"]] for word in (results["logit_lens"] or [])[:TOP_WORDS]],
        "text_loss": (results.get("text") or {}).get("loss"),
    }


def _answers(run: StudyRun) -> dict[str, dict[str, float]]:
    """Exact match by type and the loss, at each step that was validated."""
    from nemo_pre.run_files.metrics import METRICS, read_metrics

    file = run.directory / METRICS
    found: dict[str, dict[str, float]] = {}
    for line in read_metrics(file) if file.is_file() else []:
        values = {name: value for name, value in line.items() if name.startswith("val/") and value is not None}
        if values:
            step = found.setdefault(str(line["step"]), {})
            step |= {name.removeprefix("val/"): float(value) for name, value in values.items()}
    return found


def _training(run: StudyRun) -> dict[str, float]:
    """Medians of what the last steps recorded: gradient norms and the objectives' losses."""
    from nemo_pre.run_files.metrics import METRICS, read_metrics

    file = run.directory / METRICS
    values: dict[str, list[float]] = {}
    for line in read_metrics(file) if file.is_file() else []:
        for name, value in line.items():
            kept = name == "grad_norm" or name.startswith(("grad_norm/", "lm/", "pre/", "laver/", "viral/"))
            if kept and value is not None:
                values.setdefault(name, []).append(float(value))
    return {name: statistics.median(of[-LAST_STEPS:]) for name, of in values.items()}


# --- metrics --------------------------------------------------------------------------------------------------------


def value(seed: Mapping[str, Any], summary: Summary, metric: str) -> float | None:
    """One seed's number, None where it is not there.

    Args:
        metric: ``MEASURE@DEPTH``, ``MEASURE change@DEPTH`` (less the input's), both with `` PHASE`` behind (``end``
            unless given), ``exact_match``, ``exact_match/TYPE``, ``lm_loss``, ``text_loss`` or ``text_loss change``.
    """
    if metric.startswith("text_loss"):
        end, start = (_text_loss(seed, phase) for phase in ("end", "start"))
        if not metric.endswith("change"):
            return end
        return None if end is None or start is None else end - start
    if "@" not in metric:
        last = seed["answers"].get(str(summary["settings"]["steps"]), {})
        return last.get(metric)
    named, _, place = metric.partition("@")
    depth, _, phase = place.partition(" ")
    name = named.removesuffix(" change")
    layer = _at(seed, summary, name, depth, phase or "end")
    if name == named or layer is None:
        return layer
    entering = _at(seed, summary, name, "input", phase or "end")
    return None if entering is None else layer - entering


def _text_loss(seed: Mapping[str, Any], phase: str) -> float | None:
    found = seed["phases"].get(phase)
    return None if found is None else found["text_loss"]


def _at(seed: Mapping[str, Any], summary: Summary, name: str, depth: str, phase: str) -> float | None:
    found = seed["phases"].get(phase)
    if found is None:
        return None
    layer = found["layers"].get(str(summary["settings"]["layers"][depth]))
    if layer is None:
        return None
    if name in OF_OBJECTS:
        of = layer["objects"].get(name)
        return None if of is None else float(of["accuracy"])
    if name in SAYS_NAME:
        return layer["objects"].get(name)
    if name in BY_LAYER:
        return layer[name]
    return layer["probes"].get(name)


def over_seeds(summary: Summary, arm: str, metric: str) -> Estimate | None:
    """Mean with Student's interval over the seeds that have it."""
    found = by_seed(summary, arm, metric)
    return mean_interval(list(found.values())) if found else None


def between(summary: Summary, arm: str, other: str, metric: str, other_metric: str | None = None) -> Estimate | None:
    """``arm``'s metric less ``other``'s (or ``other_metric`` of it), paired by the seeds that have both."""
    ours, theirs = by_seed(summary, arm, metric), by_seed(summary, other, other_metric or metric)
    both = [seed for seed in ours if seed in theirs]
    if not both:
        return None
    mine, others = ({seed: of[seed] for seed in both} for of in (ours, theirs))
    return difference(mine, others, matched=True).estimate


def by_seed(summary: Summary, arm: str, metric: str) -> dict[str, float]:
    found = summary["arms"].get(arm)
    values = {seed: value(of, summary, metric) for seed, of in found["seeds"].items()} if found else {}
    return {seed: of for seed, of in values.items() if of is not None}
