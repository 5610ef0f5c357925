"""An encoder that starts as a tower, through a run: kept where it is frozen, and not asked for again."""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file

from nemo_pre.config.compose import compose_run
from nemo_pre.features.tower import tower_weights
from nemo_pre.huggingface.start_tower import TOWERS
from nemo_pre.teaching.teach import WEIGHTS
from tests.training.job import train
from tests.training.test_resume import overrides


def test_a_frozen_encoder_ends_as_the_tower_it_started_as_and_a_resume_needs_no_tower(digits, tmp_path):
    tower = shutil.copytree(TOWERS / "digits", tmp_path / "tower")
    stored = load_file(tower / WEIGHTS)
    frozen = ["objective=none", "objective.pre.layers=null", "objective.pre.ema_momentum=null", "parallel=pp2"]
    words = overrides(tmp_path / "run", digits, *frozen, f"vision_from={tower}", "optim.freeze_vision=true")
    start, source = tower_weights(compose_run(words))
    assert source == str(tower) and all(torch.equal(start[name], stored[name]) for name in stored)
    train(2, [*words, "trainer.max_steps=1"])
    shutil.rmtree(tower)
    train(2, [*words, "trainer.max_steps=2", "trainer.checkpoint_every=2"])
    found, source = tower_weights(compose_run([*words, "trainer.max_steps=2"]))
    assert source.endswith("step=2")
    assert {name: torch.equal(found[name], stored[name]) for name in stored} == dict.fromkeys(stored, True)
