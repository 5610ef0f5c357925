"""Alignment of a large model: with the language model frozen, later pipeline stages have nothing to train."""

from __future__ import annotations

import json

import pytest

from tests.training.job import train
from tests.training.test_resume import overrides

ALIGN = ["objective=none", "objective.pre.layers=null", "objective.pre.ema_momentum=null", "trainer.max_steps=4",
         "trainer.checkpoint_every=2", "optim.freeze_language=true", "optim.freeze_vision=true"]  # fmt: skip


def test_stages_without_a_trainable_parameter_train_and_resume_as_a_lone_replica_does(digits, tmp_path):
    """Random weights depend on the pipeline, so a run of one replica is what two are compared with."""
    layouts = {"one": ["parallel.pipeline=2"], "two": ["parallel.pipeline=2", "parallel.data=2"]}
    found = {}
    for name, layout in layouts.items():
        ranks = 2 * (1 + ("parallel.data=2" in layout))
        words = overrides(tmp_path / name, digits, *ALIGN, *layout)
        train(ranks, [*words, "trainer.max_steps=2"])
        train(ranks, words, saves=False)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        found[name] = {line["step"]: (line["lm/loss"], line["grad_norm"]) for line in lines if "lm/loss" in line}
    assert sorted(found["one"]) == [1, 2, 3, 4]
    for step, values in found["one"].items():
        assert found["two"][step] == pytest.approx(values, rel=1e-4), step
        assert values[1] > 0
