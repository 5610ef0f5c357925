"""The moving and the external anchor, in whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.job import Job, StepRecord, train
from tests.parity.test_parity import GRADIENT, IMAGES
from tests.ranks import run_on_standing_ranks
from tests.ranks.sharded import assemble
from tests.reference import tiny
from tests.reference.viral import ViralReference
from tests.training.job import train as train_run
from tests.training.test_resume import losses, overrides


def pre_losses(output: Path, digits: Path, momentum: str, *others: str) -> list[float]:
    settings = [
        "parallel=single",
        "trainer.max_steps=3",
        "trainer.checkpoint_every=null",
        "resume=false",
        "optim.warmup_ratio=0",
        f"objective.pre.ema_momentum={momentum}",
        *others,
    ]
    train_run(1, overrides(output, digits, *settings), saves=False)
    return [pre for _, pre in losses(output).values()]


def test_the_moving_anchor_follows_the_projector_at_the_pace_of_its_momentum(digits, tmp_path):
    live = pre_losses(tmp_path / "live", digits, "null")
    follows = pre_losses(tmp_path / "follows", digits, "0.0")  # the average is the projector after every step
    stands = pre_losses(tmp_path / "stands", digits, "1.0")  # the average stays what the projector was at first
    assert len(live) == 3
    assert follows == pytest.approx(live, abs=1e-6)
    assert stands[0] == pytest.approx(live[0], abs=1e-6)
    assert abs(stands[2] - live[2]) > 1e-4


def test_the_moving_anchor_starts_from_the_projector_of_the_stage_before(digits, tmp_path):
    former = ["parallel=single", "trainer.max_steps=1", "trainer.checkpoint_every=1", "optim.warmup_ratio=0"]
    first = tmp_path / "first"
    train_run(1, overrides(first, digits, *former, "seed=7", "optim.lr=0.1"))
    start = f"init_from={first / 'checkpoints'}"
    live, stands = (pre_losses(tmp_path / name, digits, name, start) for name in ("null", "1.0"))
    assert stands[0] == pytest.approx(live[0], abs=1e-6)


def with_external_anchor(path: Path, parallel: dict) -> list[StepRecord]:
    state = tiny.random_state(tiny.tiny_config(pre_layers=(3,)))
    generator = torch.Generator().manual_seed(5)
    state["pre_heads.3.fc2.weight"] = torch.randn(24, 8, generator=generator) * 0.3  # the width of the anchor
    state["pre_heads.3.fc2.bias"] = torch.randn(24, generator=generator) * 0.1
    data = [tiny.random_batch(images, seed=m) for m, images in enumerate(IMAGES[0])]
    pre = {"layers": [3], "anchor": "external", "external_path": str(path)}
    job = Job(parallel=parallel, pre=pre, steps=[[data]], state=state)
    return [ranks[0] for ranks in run_on_standing_ranks(train, job.world_size, job, timeout=150)]


def with_frozen_target(path: Path, parallel: dict) -> list[StepRecord]:
    """VIRAL's relational form on a target that runs on the first stage."""
    state = tiny.random_state(tiny.tiny_config(viral=ViralReference(layers=(3,))))
    generator = torch.Generator().manual_seed(5)
    state["viral_head.fc3.weight"] = torch.randn(24, tiny.VIRAL_HEAD, generator=generator) * 0.3
    state["viral_head.fc3.bias"] = torch.randn(24, generator=generator) * 0.1
    data = [tiny.random_batch(images, seed=m) for m, images in enumerate(IMAGES[0])]
    viral = {"layers": [3], "form": "similarity", "target_path": str(path), "head_hidden_width": tiny.VIRAL_HEAD}
    job = Job(parallel=parallel, pre=None, viral=viral, steps=[[data]], state=state)
    return [ranks[0] for ranks in run_on_standing_ranks(train, job.world_size, job, timeout=150)]


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"tensor": 2, "sequence": True}], ids=["PP2", "TP2-SP"])
def test_a_frozen_target_gives_the_same_loss_and_gradients_in_every_layout(external_model, parallel):
    alone = with_frozen_target(external_model, {})
    spread = with_frozen_target(external_model, parallel)
    loss = alone[0].metrics["viral/loss"]
    assert loss > 1e-3 and spread[0].metrics["viral/loss"] == pytest.approx(loss, rel=1e-5)
    expected, found = assemble([alone[0].gradients]), assemble([rank.gradients for rank in spread])
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert found.keys() == expected.keys() and expected["viral_head.fc3.weight"].any()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= GRADIENT * gradient.norm() + 1e-7 * total, name


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"tensor": 2, "sequence": True}], ids=["PP2", "TP2-SP"])
def test_the_external_anchor_gives_the_same_loss_and_gradients_in_every_layout(external_model, parallel):
    alone = with_external_anchor(external_model, {})
    spread = with_external_anchor(external_model, parallel)
    assert spread[0].metrics["pre/loss"] == pytest.approx(alone[0].metrics["pre/loss"], abs=1e-6)
    expected, found = assemble([alone[0].gradients]), assemble([rank.gradients for rank in spread])
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert found.keys() == expected.keys() and expected["pre_heads.3.fc2.weight"].any()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= GRADIENT * gradient.norm() + 1e-7 * total, name
