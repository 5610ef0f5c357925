"""``nemo-pre rehearse``: a run's real steps at its true size, on fake tensors, before any GPU sees it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_pre.compat import versions
from nemo_pre.config.run import RunConfig
from nemo_pre.launch.ranks import RankFailure
from nemo_pre.rehearsal.run import Rehearsed, Wishes, run_rehearsal
from nemo_pre.rehearsal.tables import describe


@dataclass
class Options:
    """The words of ``nemo-pre rehearse`` that are not the run's."""

    layers: int | None = None
    stages: list[int] | None = None
    messages: bool = True
    jobs: int = 0
    json: str | None = None


def rehearse(arguments: Sequence[str]) -> None:
    """Rehearse the run that the words describe, and print what was found.

    Raises:
        ValueError: one sentence on a wrong word or run.
        RankFailure: a rank raised, or a tolerance is missed.
    """
    overrides, options = read_options(arguments)
    from nemo_pre.config.compose import compose_run

    config = compose_run(overrides)
    check(config, options)
    rehearsed = run_rehearsal(config, wishes_of(options), tell)
    print(describe(rehearsed))
    if options.json is not None:
        Path(options.json).write_text(json.dumps(rehearsed.as_json(), indent=1) + "\n")
        print(f"written to {options.json}")
    refuse_problems(rehearsed)
    with_nemo = versions.installed("nemo_toolkit") is not None
    then = f"nemo-pre submit {shlex.join(overrides)}" if with_nemo else "a loop of your own"
    print(f"{config.name} rehearses without a problem; next: {then}")


def refuse_problems(rehearsed: Rehearsed) -> None:
    """End with exit code 1 where something is wrong, which the table has told."""
    if rehearsed.problems:
        number = len(rehearsed.problems)
        raise RankFailure(
            f"The rehearsal of {rehearsed.name} found {number} problem{'s' * (number > 1)}: {rehearsed.problems[0]}"
        )


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def wishes_of(options: Options) -> Wishes:
    return Wishes(options.layers, options.stages, options.messages, options.jobs or default_jobs())


def default_jobs() -> int:
    """Ranks at a time: as many as there are cores; a rank takes one, and about a gigabyte."""
    return max(len(os.sched_getaffinity(0)), 1)


def check(config: RunConfig, options: Options) -> None:
    """Refuse what cannot be rehearsed.

    Raises:
        ValueError: one sentence on the run, or on stages or layers that it does not have.
    """
    from dataclasses import replace

    from nemo_pre.checks.run import check_options

    check_options(replace(config, dry_run=True))
    layout, layers = config.parallel, config.model.language.num_layers
    for stage in options.stages or []:
        if not 0 <= stage < layout.pipeline:
            raise ValueError(f"stages={stage + 1} is none of the run's {layout.pipeline} pipeline stages.")
    if options.layers is not None and options.layers > layers:
        raise ValueError(f"layers={options.layers} is more than the {layers} decoder layers of the model.")


def read_options(arguments: Sequence[str]) -> tuple[list[str], Options]:
    """The run's overrides, and the rehearsal's own options among the words.

    Raises:
        ValueError: one sentence on a word that fits nowhere.
    """
    options, overrides = Options(), []
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("-") or not equals:
            raise ValueError(f"'{word}' is not an option of nemo-pre rehearse: see nemo-pre rehearse --help.")
        if name in ("layers", "jobs"):
            setattr(options, name, _number(word, value))
        elif name == "stages":
            numbers = value.strip("[]").split(",")
            options.stages = [_number(word, number.strip()) - 1 for number in numbers]
        elif name == "messages":
            if value not in ("true", "false"):
                raise ValueError(f"{word} is neither messages=true nor messages=false.")
            options.messages = value == "true"
        elif name == "json":
            options.json = value
        else:
            overrides.append(word)
    return overrides, options


def _number(word: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{word} must be whole numbers of 1 or more.")
    return int(value)


def rehearse_help() -> str:
    return """nemo-pre rehearse experiment=NAME [GROUP=CHOICE ...] [OPTION=VALUE ...]

Runs two of the run's own optimizer steps at their true size, one rank at a time, on fake GPU tensors: nothing is
allocated or computed, no GPU, no data and no weights are needed. A rank takes a core, about a gigabyte and up to a few
minutes.

  nemo-pre rehearse experiment=siglip2_qwen25_7b_stage2_full_pre
  nemo-pre rehearse experiment=siglip2_qwen25_72b_stage1_align stages=1,4 json=rehearsal.json
  nemo-pre rehearse all                                 every recipe, into docs/rehearsals.md: see its own --help

Says of every stage that differs the peak memory beside the plan's and the lines of code that hold it, what a step
leaves behind, FLOPs, kernels, messages beside the plan's, and where the host waits for its device; and whether the
calls of all stages and of a second replica meet, or wait for each other for ever. Ends with 1 where something is
wrong.

Beside the options of nemo-pre train:
  layers=N             cut the decoder and the tower to about N layers
  stages=1,3           of which pipeline stages; default: one of each kind
  messages=false       do not match the ranks' calls, and leave out second tensor-parallel ranks
  jobs=N               ranks at a time; default: as many as cores
  json=FILE            write everything there too

docs/rehearsing.md says how it works and what it cannot see."""
