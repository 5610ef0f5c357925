"""``nemo-pre plan``: what a run needs, and how its GPUs are best laid out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nemo_pre.checks.presence import check_init_from
from nemo_pre.checks.run import check_options
from nemo_pre.config.derived import world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.config.words import check_spelling
from nemo_pre.options import Rule
from nemo_pre.planner.devices import DEVICES, Device, Efficiency, device_of_cluster
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.plan import Plan, plan_layout
from nemo_pre.planner.search import Candidate, Found, search
from nemo_pre.planner.step_time import StepTime, calibrated
from nemo_pre.planner.tables import describe_plan, describe_search, describe_times
from nemo_pre.run_files.outputs import check_output_file

DEFAULT_GPU = "h100"
WORDS = ("cluster.gpus", "images_per_row", "best", "price", "json", "calibrate")
MOST = 1_000_000  # GPUs, images and layouts: the search walks through the divisors of their number


@dataclass
class Options:
    """The words of ``nemo-pre plan`` that are not the run's.

    Attributes:
        gpus: None: as many as the layout has, and no search.
        images_per_row: images of a row; None: one, or as many as packing allows.
        best: layouts to show.
        calibrate: metrics.jsonl of a run of these options, which the matrix efficiency is taken from.
        efficiency: assumed parts of the data sheet's figures.
        price: of a GPU hour, in any currency; None: no cost is given.
        json: file to write.
    """

    gpus: int | None = None
    images_per_row: int | None = None
    best: int = 5
    calibrate: str | None = None
    efficiency: Efficiency = field(default_factory=Efficiency)
    price: float | None = None
    json: str | None = None


def plan(arguments: Sequence[str]) -> None:
    """Print what the run needs in its own layout and, given ``cluster.gpus``, the best layouts of these GPUs.

    Raises:
        ValueError: one sentence on a wrong word or a run that is not complete.
    """
    overrides, options = read_options(arguments)
    from nemo_pre.config.compose import compose_run

    config = compose_run(overrides)
    if any(word.startswith("init_from=") for word in overrides):  # which may bring the model
        check_init_from(config)
    if options.json is not None:
        check_output_file("json", options.json)
    device = device_of_cluster(config.cluster) or DEVICES[DEFAULT_GPU]
    efficiency = options.efficiency
    if options.calibrate is not None:
        load = largest_load(config, options.images_per_row)
        efficiency = calibrated(config, load, device, efficiency, options.calibrate)
    own = plan_layout(_on(config, options.gpus), device, efficiency, options.images_per_row)
    found = None
    if options.gpus is not None:
        found = search(config, options.gpus, device, efficiency, check_options, options.images_per_row, options.best)
    text = describe_plan(own, device, efficiency)
    if own.time is not None:
        text += "\n\n" + describe_times(own, device, efficiency, options.price)
    if found is not None and options.gpus is not None:
        text += "\n\n" + describe_search(found, options.gpus, device, config.trainer.max_steps, options.price)
    print(text)
    made = f"the plan of {config.name}"
    if options.json is not None:
        Path(options.json).write_text(json.dumps(as_json(own, found, device, efficiency), indent=1) + "\n")
        made = f"written to {options.json}"
    print(f"\n{made}; next: nemo-pre train ... dry_run=true, then nemo-pre submit ... cluster=SITE")


def _on(config: RunConfig, gpus: int | None) -> RunConfig:
    """The run in its own layout with as many replicas as ``gpus`` allow; unchanged where they do not divide."""
    layout = config.parallel
    one = world_size(layout) // layout.data
    if gpus is None or gpus % one:
        return config
    return replace(config, parallel=replace(layout, data=gpus // one))


# --- words in, JSON out ---------------------------------------------------------------------------------------------


def read_options(arguments: Sequence[str]) -> tuple[list[str], Options]:
    """The run's overrides, and the planner's own options among the words.

    Raises:
        ValueError: a value that is not a number.
    """
    options, overrides = Options(), []
    efficiencies = {f"efficiency.{part.name}" for part in fields(Efficiency)}
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("-") or not equals:
            raise ValueError(f"'{word}' is not an option of nemo-pre plan: see nemo-pre plan --help.")
        if name in ("cluster.gpus", "images_per_row", "best"):
            setattr(options, name.removeprefix("cluster."), int(read_number(word, value, whole=True)))
        elif name in efficiencies:
            part = {name.removeprefix("efficiency."): read_number(word, value)}
            options.efficiency = replace(options.efficiency, **part)
        elif name == "price":
            options.price = read_number(word, value, most=None)
        elif name in ("json", "calibrate"):
            setattr(options, name, named(name, value))
        else:
            check_spelling(word, (*WORDS, *efficiencies))
            overrides.append(word)
    return overrides, options


def named(name: str, value: str) -> str:
    """The text of NAME=VALUE, in which a leading ``~`` is the user's home.

    Raises:
        ValueError: it is empty.
    """
    problem = Rule(path=True).problem(name, value)
    if problem is not None:
        raise ValueError(problem)
    return os.path.expanduser(value)


def read_number(word: str, value: str, whole: bool = False, most: float | None = 1.0) -> float:
    """A number above 0 of the word OPTION=VALUE.

    Args:
        most: the largest; of whole numbers it is :data:`MOST`.

    Raises:
        ValueError: it is none, or out of range.
    """
    try:
        number = float(int(value) if whole else float(value))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{word} is not a {'whole ' if whole else ''}number.") from error
    limit = MOST if whole else most
    if not number > 0 or math.isinf(number) or (limit is not None and number > limit):
        within = f"between 1 and {MOST:,}" if whole else "above 0" + (f" and at most {most:g}" if most else "")
        raise ValueError(f"{word} must be {within}.")
    return number


def as_json(own: Plan, found: Found | None, device: Device, efficiency: Efficiency) -> dict[str, Any]:
    """The plan as JSON: everything the tables show, in bytes, seconds and operations."""
    result: dict[str, Any] = {
        "run": own.config.name,
        "gpu": device.name,
        "efficiency": vars(efficiency),
        "measured_on_a_gpu": False,
        "parameters": own.parameters,
        "flops_per_step": own.flops,
        "layout": layout_json(own.config),
        "problem": own.problem,
        "readers": own.readers,
        "messages": [asdict(message) for message in own.messages],
        "not_counted": own.not_counted,
    }
    if own.time is not None:
        result["time"] = time_json(own.time, device, own.config.trainer.max_steps)
        result["stages"] = {
            stage + 1: {
                "parameters": number,
                "bytes": memory.total,
                "by_kind": memory.by_kind,
                "micro_batches_in_flight": memory.in_flight,
            }
            for stage, (number, memory) in own.stages.items()
        }
    if found is not None:
        result["search"] = {
            "fitting": found.fitting,
            "best": [_candidate_json(candidate, device) for candidate in found.best],
            "refused": {
                kind: {"number": refused.number, "nearest": refused.nearest} for kind, refused in found.refused.items()
            },
        }
    return result


def _candidate_json(candidate: Candidate, device: Device) -> dict[str, Any]:
    time = time_json(candidate.time, device, candidate.config.trainer.max_steps)
    return {"layout": layout_json(candidate.config), "bytes": candidate.memory, "time": time}


def layout_json(config: RunConfig) -> dict[str, Any]:
    layout = config.parallel
    names = ("tensor", "pipeline", "virtual_pipeline", "pipeline_layers", "context", "sequence", "data", "recompute")
    return {**{name: getattr(layout, name) for name in names}, "micro_batch_size": config.trainer.micro_batch_size}


def time_json(time: StepTime, device: Device, steps: int) -> dict[str, Any]:
    return {
        "step_seconds": time.seconds,
        "pipeline_seconds": time.pipeline,
        "gradient_seconds": time.gradients,
        "optimizer_seconds": time.optimizer,
        "objective_seconds": time.objectives,
        "bubble": time.bubble,
        "balance": time.balance,
        "tokens_per_second": time.tokens_per_second,
        "model_flops_utilization": time.utilization(device),
        "gpus": time.ranks,
        "gpu_hours": time.seconds * steps * time.ranks / 3600,
        "days": time.seconds * steps / 86400,
    }


def plan_help() -> str:
    assumed = ", ".join(f"efficiency.{part.name}={getattr(Efficiency(), part.name)}" for part in fields(Efficiency))
    return f"""nemo-pre plan experiment=NAME [GROUP=CHOICE ...] [OPTION=VALUE ...] [cluster.gpus=N cluster.gpu=NAME]

Says what a run needs before anyone queues: parameters, memory of the fullest rank, FLOPs, step time and GPU hours in
the run's own layout; with cluster.gpus the fastest layouts of that many GPUs that fit, and why the others do not.

  nemo-pre plan experiment=llava15_7b_stage2_full
  nemo-pre plan experiment=llava15_7b_stage2_full cluster.gpus=64 cluster.gpu=h100 json=plan.json

Beside the options of nemo-pre train:
  cluster.gpus=N       number of GPUs to search layouts for
  cluster.gpu=NAME     {", ".join(DEVICES)}; default: the cluster's, else {DEFAULT_GPU}
  images_per_row=N     images of every sample; default 1, with packing as many as fit
  best=5               layouts to show
  price=X              of a GPU hour, for the cost in the same currency
  json=FILE            write everything there too
  calibrate=FILE       take efficiency.matrix from metrics.jsonl of a run with the same options
  {assumed}

Counts of parameters, FLOPs and of what CPU runs keep for backward passes are exact; memory of Transformer Engine's
layers and all times are estimates that were not checked on a GPU."""
