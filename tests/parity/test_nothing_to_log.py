"""Runs whose batches have no answer, or no image, log nothing of them: on ranks, beside steps that have both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.parity.job import Job, StepRecord
from tests.parity.layouts import LAYOUTS
from tests.parity.test_parity import run
from tests.reference import tiny

LOSS = "reduced_train_loss"


def without_loss(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])}


def steps(replicas: int) -> list[list[list[dict[str, Any]]]]:
    """A step with images and answers, one with images alone, one with answers alone, and the first again."""
    with_images = [[tiny.random_batch((1, 2), seed=10 * rank + m) for m in range(4)] for rank in range(replicas)]
    answers = [[tiny.random_batch((0, 0), seed=10 * rank + m) for m in range(4)] for rank in range(replicas)]
    images = [[without_loss(batch) for batch in batches] for batches in with_images]
    return [with_images, images, answers, with_images]


@pytest.mark.parametrize("layout", ["PP2", "CP2", "DP2"])
def test_runs_log_what_their_batches_have(layout):
    """On the first rank, which writes; under pipelines a loss arrives there from the last."""
    axes = LAYOUTS[layout]
    config = tiny.tiny_config(pre_layers=(3,))
    job = Job(parallel=axes, pre={"layers": [3]}, steps=steps(axes.get("data", 1)), state=tiny.random_state(config))
    records: list[StepRecord] = [ranks[0] for ranks in run(job)]
    whole, no_answers, no_images, again = (record.metrics for record in records)
    assert {LOSS, "pre/loss", "pre/cosine", "pre/weight"} <= whole.keys() == again.keys()
    assert whole[LOSS] == again[LOSS] and all(map(math.isfinite, whole.values()))
    assert whole.keys() - no_answers.keys() == {LOSS}
    assert no_answers["pre/loss"] == pytest.approx(whole["pre/loss"], abs=1e-6)
    assert whole.keys() - no_images.keys() == {"pre/loss", "pre/cosine"}
    assert math.isfinite(no_images[LOSS])
