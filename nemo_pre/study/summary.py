"""The numbers of a study's runs, means over seeds with 95% intervals, and differences between arms, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nemo_pre.report.intervals import Estimate, difference, mean_interval
from nemo_pre.study.arms import Arm
from nemo_pre.study.runs import DIAGNOSED, DIAGNOSTICS, TRAINED, StudyRun

FORMAT, FORMAT_VERSION = "nemo-pre study", 1
SUMMARY = "summary.json"
BY_LAYER = (
    "pairwise_cosine",
    "cohesion",
    "coupling",
    "contrast_difference",
    "effective_dimension",
    "redundancy",
    "cka_to_layer_0",
    "length",
    "distance_to_layer_0",
    "attention_to_visual",
)

Numbers = dict[str, float]
Summary = dict[str, Any]


def summarise(arms: Sequence[Arm], runs: Sequence[StudyRun], settings: Mapping[str, Any]) -> Summary:
    """A summary of the finished runs; an arm without any is left out.

    A metric is ``exact_match``, ``exact_match/TYPE``, ``loss``, or a diagnostic at a depth of ``settings["layers"]``,
    as ``NAME@DEPTH``, or ``NAME change@DEPTH``, which is that less the input's.
    """
    measured = {arm.name: {run.seed: _measured(run) for run in runs if run.arm == arm.name} for arm in arms}
    numbers = {
        name: {seed: _numbers(found, settings["layers"]) for seed, found in by_seed.items()}
        for name, by_seed in measured.items()
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **provenance(runs),
        "settings": dict(settings),
        "arms": {
            arm.name: {
                "label": arm.label,
                "overrides": list(arm.overrides),
                "first_stage": arm.first_stage,
                "seeds": {str(seed): found for seed, found in measured[arm.name].items()},
                "metrics": _over_seeds(numbers[arm.name]),
                "against": {
                    other: _differences(numbers[arm.name], numbers[other])
                    for other in arm.against
                    if numbers.get(other)
                },
            }
            for arm in arms
            if measured[arm.name]
        },
    }


def write_summary(summary: Summary, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def refuse_loss(out: Path, settings: Mapping[str, Any], asked: Collection[tuple[str, int]]) -> None:
    """Refuse to write over a summary whose numbers the new one would not have.

    Args:
        settings: of the study that is about to run, but for what is known only at its end.
        asked: arm and seed of each of its runs.

    Raises:
        ValueError: ``out`` has a summary of other settings, of runs that are not asked for, or one that is none.
    """
    file = out / SUMMARY
    if not file.is_file():
        return
    elsewhere = "give another out=DIRECTORY, or remove it"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        before = summary["settings"]
        held = {(arm, int(seed)) for arm, of in summary["arms"].items() for seed in of["seeds"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no summary of this study ({error!r}): {elsewhere}.") from error
    if told_apart := differing(before, settings, settings):
        raise ValueError(f"{file} has the numbers of a study with other settings ({told_apart}): {elsewhere}.")
    if lost := sorted(held - {*asked}):
        named = ", ".join(f"{arm} seed {seed}" for arm, seed in lost)
        raise ValueError(
            f"{file} has numbers of runs that are not asked for ({named}): ask for these too, or {elsewhere}."
        )


def differing(before: Mapping[str, Any], now: Mapping[str, Any], names: Collection[str]) -> str:
    """Which settings of ``names`` differ, with both values; empty where none does."""
    asked = json.loads(json.dumps(dict(now)))
    return "; ".join(
        f"{name} {_short(before.get(name))}, here {_short(asked.get(name))}"
        for name in sorted(names)
        if before.get(name) != asked.get(name)
    )


def _short(value: Any) -> str:
    told = json.dumps(value)
    return told if len(told) <= 60 else told[:57] + "..."


def _measured(run: StudyRun) -> dict[str, Any]:
    """What one run recorded: answers at its end, every layer's diagnostics, and its way there."""
    from nemo_pre.diagnostics.over_training import over_training
    from nemo_pre.diagnostics.results import read_results
    from nemo_pre.run_files.metrics import METRICS, read_metrics

    by_step: dict[int, Numbers] = {}
    for line in read_metrics(run.directory / METRICS):
        by_step.setdefault(line["step"], {}).update(line)
    last = by_step[max(by_step)]
    results = read_results(run.directory / DIAGNOSTICS)
    layers = [
        {"layer": layer["layer"], **{name: layer.get(name) for name in BY_LAYER}, "probe": layer["probe"]}
        for layer in results["layers"]
    ]
    return {
        "seconds": json.loads((run.directory / TRAINED).read_text())["seconds"],
        "loss": last["val/lm_loss"],
        "exact_match": {
            name.removeprefix("val/exact_match").lstrip("/") or "all": value
            for name, value in last.items()
            if name.startswith("val/exact_match")
        },
        "answers": {
            name.removeprefix("val/answers").lstrip("/") or "all": round(value)
            for name, value in last.items()
            if name.startswith("val/answers")
        },
        "layers": layers,
        "over_training": over_training(run.directory, results["layers"][-1]["layer"]),
    }


def _numbers(found: Mapping[str, Any], depths: Mapping[str, int]) -> Numbers:
    numbers = {"loss": found["loss"]}
    numbers |= {
        "exact_match" if kind == "all" else f"exact_match/{kind}": value
        for kind, value in found["exact_match"].items()
    }
    curves: dict[str, list[float | None]] = {name: [layer[name] for layer in found["layers"]] for name in BY_LAYER}
    for task in found["layers"][0]["probe"]:
        curves[f"probe_{task}"] = [layer["probe"][task]["accuracy"] for layer in found["layers"]]
    for name, curve in curves.items():
        first = curve[0]
        for depth, layer in depths.items():
            value = curve[layer]
            if value is not None:
                numbers[f"{name}@{depth}"] = value
            if layer and value is not None and first is not None:
                numbers[f"{name} change@{depth}"] = value - first
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _over_seeds(numbers: Mapping[int, Numbers]) -> dict[str, Any]:
    names = _shared(numbers.values())
    return {name: _as_json(mean_interval([of[name] for of in numbers.values()])) for name in names}


def _differences(ours: Mapping[int, Numbers], theirs: Mapping[int, Numbers]) -> dict[str, Any]:
    """Differences over the seeds that both have, paired; every run of a seed starts from the same weights and sees the
    same data."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return {}
    names = _shared([of[seed] for of in (ours, theirs) for seed in seeds])
    return {
        name: _as_json(
            difference({s: ours[s][name] for s in seeds}, {s: theirs[s][name] for s in seeds}, matched=True).estimate
        )
        for name in names
    }


def _shared(numbers: Any) -> list[str]:
    every = list(numbers)
    return [name for name in every[0] if all(name in other for other in every)] if every else []


def _as_json(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


def provenance(runs: Sequence[StudyRun]) -> dict[str, Any]:
    """When, where and with what the ``runs`` were made; ``date``: of the newest, however often its numbers are written
    anew."""
    from importlib.metadata import version

    from nemo_pre.launch.environment import visible_gpus

    newest = max((run.directory / DIAGNOSED).stat().st_mtime for run in runs)
    return {
        "date": f"{datetime.fromtimestamp(newest, timezone.utc):%Y-%m-%d}",
        "machine": {"gpus": visible_gpus(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "megatron-core", "nemo_toolkit")},
    }
