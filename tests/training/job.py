"""Whole runs through the product's own entry point, on ranks of this machine."""

from __future__ import annotations

from typing import Any
from unittest import mock

from nemo_pre.config.compose import compose_run
from nemo_pre.config.run import RunConfig
from tests.ranks import run_on_standing_ranks


def train(ranks: int, overrides: list[str], timeout: float = 200.0, saves: bool = True) -> None:
    """Train the run that ``nemo-pre train OVERRIDES`` describes; composed once, here, as the launcher does.

    With ``saves=False`` nothing is written where the run would save a checkpoint: for tests that read its metrics
    alone.
    """
    run_on_standing_ranks(_run if saves else _run_without_saving, ranks, compose_run(overrides), timeout=timeout)


def train_and_describe(overrides: list[str]) -> list[dict[str, Any]]:
    """The same on one rank and without saving; returns the optimizer's parameter groups, without their parameters."""
    return run_on_standing_ranks(_run_and_describe, 1, compose_run(overrides), timeout=200.0)[0]


def train_forgetting_the_teacher(overrides: list[str]) -> None:
    """The same on one rank and without saving, but a checkpoint's float32 average is not read: it starts as the
    student."""
    run_on_standing_ranks(_run_forgetting_the_teacher, 1, compose_run(overrides))


def _run(config: RunConfig) -> None:
    """The curves are not drawn, which takes a fifth of a small run: tests/callbacks/test_plots.py and
    tests/packaging/test_wheel.py have them drawn."""
    from nemo_pre.train import run_rank

    with mock.patch("nemo_pre.plots.plot_run"):
        run_rank(config)


def _run_without_saving(config: RunConfig) -> None:
    from nemo_pre.callbacks.checkpoint import RunCheckpoint

    with mock.patch.object(RunCheckpoint, "_save_topk_checkpoint"):
        _run(config)


def _run_and_describe(config: RunConfig) -> list[dict[str, Any]]:
    from nemo_pre import train

    build, trainers = train.build_trainer, []

    def build_and_keep(*arguments: Any, **options: Any) -> Any:
        trainers.append(build(*arguments, **options))
        return trainers[0]

    with mock.patch.object(train, "build_trainer", build_and_keep):
        _run_without_saving(config)
    groups = trainers[0].optimizers[0].param_groups
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def _run_forgetting_the_teacher(config: RunConfig) -> None:
    from nemo_pre.objectives.laver.teacher import Teacher

    with mock.patch.object(Teacher, "_load"):
        _run_without_saving(config)
