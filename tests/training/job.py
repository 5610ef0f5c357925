"""The rank's side: whole runs through the product's own entry point."""

from __future__ import annotations


def run(overrides: list[str]) -> None:
    """Train the run that ``nemo-pre train OVERRIDES`` describes, on this rank."""
    from nemo_pre.config.compose import compose_run
    from nemo_pre.train import run_rank

    run_rank(compose_run(overrides))


def run_forgetting_the_teacher(overrides: list[str]) -> None:
    """The same, but a checkpoint's float32 average is not read: it starts as the student."""
    from nemo_pre.objectives.laver.teacher import Teacher

    Teacher._load = lambda self, values: None  # type: ignore[method-assign]
    run(overrides)
