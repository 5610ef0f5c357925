"""``nemo-pre scale``: a grid of runs, simulated, submitted, or collected when they are finished."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nemo_pre.config.words import check_spelling
from nemo_pre.planner.devices import DEVICES, Efficiency
from nemo_pre.run_files.outputs import check_output_folder, make_output_folder
from nemo_pre.scaling.grid import AXES, BATCHES, RECIPE, STUDIES, Grid, Point, axis_values, read_grid
from nemo_pre.scaling.results import SIMULATED, Result
from nemo_pre.verbs.plan import DEFAULT_GPU, named, read_number

ACTIONS = ("simulate", "submit", "collect")
WORDS = ("study", "grid", "price", "action", "gpu", "out")
RESULTS, TABLE = "results.json", "results.txt"


@dataclass
class Options:
    """The words of ``nemo-pre scale`` but for the grid's.

    Attributes:
        action: of :data:`ACTIONS`.
        out: directory of results, and of the runs.
        gpu: a name of :data:`~nemo_pre.planner.devices.DEVICES`.
        price: of a GPU hour.
        dry_run: print the jobs instead of submitting them.
        efficiency: assumed parts of the data sheet's figures.
    """

    action: str = "simulate"
    out: Path = Path("runs/scaling")
    gpu: str = DEFAULT_GPU
    price: float | None = None
    dry_run: bool = False
    efficiency: Efficiency = field(default_factory=Efficiency)


def scale(words: Sequence[str]) -> None:
    """Expand the grid; then simulate it, submit its jobs, or collect what they recorded, and draw it.

    Raises:
        ValueError: one sentence on a wrong word, or on a point that cannot be.
    """
    grid, options = read_words(words)
    points = grid.points()
    if options.action == "simulate":
        check_output_folder("out", options.out)
    from nemo_pre.scaling.simulate import simulate

    results = []
    for number, point in enumerate(points, start=1):
        if sys.stderr.isatty():
            print(f"\r{number} of {len(points)}", end="" if number < len(points) else "\n", file=sys.stderr)
        results.append(simulate(point, DEVICES[options.gpu], options.efficiency))
    if options.action == "submit":
        _submit(results, options)
        return
    if options.action == "collect":
        results = _collected(results, options.out)
    _write(results, options)


def _collected(planned: Sequence[Result], out: Path) -> list[Result]:
    """Finished runs in the place of their simulation.

    Raises:
        ValueError: none is finished.
    """
    from nemo_pre.scaling.finished import measured

    found = [measured(result, _run_dir(result.point, out)) for result in planned]
    if not any(found):
        raise ValueError(f"{out}/runs has no run of this grid with a recorded step: submit it, or choose its out=.")
    return [run or result for run, result in zip(found, planned, strict=True)]


def _submit(results: Sequence[Result], options: Options) -> None:
    """A job for every point that has a layout.

    Raises:
        ValueError: none has, or Slurm refuses a job.
    """
    from nemo_pre.slurm.submit import submit

    for result in results:
        if result.problem is not None:
            print(f"left out: {result.point.name}: {result.problem}")
    for result in results:
        if result.problem is None:
            submit([*job_words(result, options.out), *(["--dry-run"] if options.dry_run else [])])
    if all(result.problem for result in results):
        raise ValueError("No point of the grid can run: give more gpus, or another gpu=.")


def job_words(result: Result, out: Path) -> list[str]:
    """What ``nemo-pre submit`` is told of a point."""
    point = result.point
    return [*result.words, f"name={point.name}", f"output_dir={_run_dir(point, out)}"]


def _run_dir(point: Point, out: Path) -> Path:
    return out / "runs" / point.name


def _write(results: Sequence[Result], options: Options) -> None:
    from nemo_pre.scaling.figures import draw
    from nemo_pre.scaling.table import describe

    make_output_folder("out", options.out)
    text = describe(results, options.price)
    print(text)
    (options.out / TABLE).write_text(text + "\n")
    (options.out / RESULTS).write_text(json.dumps(as_json(results, options), indent=1) + "\n")
    figures = draw(results, options.out, options.price)
    made = ", ".join(str(path) for path in (options.out / TABLE, options.out / RESULTS, *figures))
    print(f"\nwritten: {made}; next: {_next(options)}")


def _next(options: Options) -> str:
    if options.action == "simulate":
        return "nemo-pre scale ... action=submit cluster=SITE"
    return "nemo-pre compare RUNS" if options.action == "collect" else "nemo-pre scale ... action=collect"


def as_json(results: Sequence[Result], options: Options) -> dict[str, Any]:
    return {
        "what": "simulated points are " + SIMULATED,
        "gpu": options.gpu,
        "efficiency": vars(options.efficiency),
        "price_of_a_gpu_hour": options.price,
        "points": [result.as_json() for result in results],
    }


# --- words ----------------------------------------------------------------------------------------------------------


def read_words(words: Sequence[str]) -> tuple[Grid, Options]:
    """The grid and the options; what is neither goes to every run.

    Raises:
        ValueError: a word that fits nowhere, or a value that is none.
    """
    options, grid, overrides = Options(), Grid(), []
    axes: dict[str, Any] = {}
    efficiencies = {f"efficiency.{part.name}" for part in fields(Efficiency)}
    for word in words:
        name, equals, value = word.partition("=")
        if word in ("--dry-run", "--dry_run"):
            options.dry_run = True
        elif word.startswith("-") or not equals:
            raise ValueError(f"'{word}' is not an option of nemo-pre scale: see nemo-pre scale --help.")
        elif name == "study":
            grid = STUDIES[_choice(name, value, STUDIES)]
        elif name == "grid":
            grid = read_grid(named(name, value))
        elif name in AXES and name != "overrides":
            axes[name] = axis_values(name, value)
        elif name in efficiencies:
            part = {name.removeprefix("efficiency."): read_number(word, value)}
            options.efficiency = replace(options.efficiency, **part)
        elif name == "price":
            options.price = read_number(word, value, most=None)
        elif name == "action":
            options.action = _choice(name, value, ACTIONS)
        elif name == "gpu":
            options.gpu = _choice(name, value, DEVICES)
        elif name == "out":
            options.out = Path(named(name, value))
        else:
            check_spelling(word, (*WORDS, *AXES, *efficiencies))
            overrides.append(word)
    return replace(grid, **axes, overrides=[*grid.overrides, *overrides]), options


def _choice(name: str, value: str, choices: Iterable[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value} is unknown: choose one of {', '.join(choices)}.")
    return value


def scale_help() -> str:
    assumed = ", ".join(f"efficiency.{part.name}={getattr(Efficiency(), part.name)}" for part in fields(Efficiency))
    return f"""nemo-pre scale study=NAME|grid=FILE.yaml|AXIS=VALUE,... [action={"|".join(ACTIONS)}] [OPTION=VALUE ...]

Expands a grid of runs and simulates every one with the planner's model (the default), submits them to Slurm, or
collects what the submitted runs have recorded. Into out=DIR: {TABLE}, {RESULTS}, and as PNG and SVG strong and weak
scaling, the regularizers' overhead against size, and cost. Simulated figures are not measurements, and say so.

  nemo-pre scale study=sizes                                           to 70B on 4,096 GPUs, simulated
  nemo-pre scale experiments=llava15_7b_stage2_full gpus=8,16,32 regularizers=none,pre price=2.5
  nemo-pre scale study=target_depth action=submit cluster=SITE --dry-run
  nemo-pre scale study=target_depth action=collect

axes, in the file lists under the same keys (and overrides: options of all runs):
  experiments    names of recipes/experiment
  gpus           numbers of GPUs
  layouts        best (the planner's fastest that fits; default), recipe, or names of recipes/parallel
  regularizers   recipe (what the experiment says), or a name of recipes/objective; default {RECIPE}
  depths         the objective's target layer as a part of the decoder's depth: 0.5 is L/2
  batches        {", ".join(BATCHES)}: the recipe's batch, or one in proportion to the GPUs; default strong
studies: {", ".join(f"{name} ({len(grid.points())} runs)" for name, grid in STUDIES.items())}

options:
  out=DIR              default {Options().out}; runs go to DIR/runs
  gpu=NAME             {", ".join(DEVICES)}; default {DEFAULT_GPU}
  price=X              of a GPU hour
  {assumed}
Anything else goes to every run: cluster=SITE, trainer.max_steps=50, data.path=..."""
