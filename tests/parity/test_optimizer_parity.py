"""Six steps of the optimizer, with a rate of its own for every module, are those of a plain AdamW on the oracle's
gradients in float64, on every backend: so they are each other's, too.

Tolerances: the losses' are those of :mod:`tests.parity.test_parity`, ten times as wide since errors add up over steps.
A weight's movement over six steps: |movement - reference's| <= 2e-5 |reference's movement| + 1e-8 |all movements| and
half a unit in the last place of the weight for every step, which float32 rounds it to.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.parity.job import Steps
from tests.parity.test_parity import GRADIENT, LOSS_LM, LOSS_PRE, NOISE, case, oracle, run
from tests.ranks.sharded import assemble
from tests.reference.neva_pre import ReferenceConfig

ROUNDING = torch.finfo(torch.float32).eps / 2
RATES = {"vision_model.": 1e-3, "vision_projection.": 4e-3, "language_model.": 2e-3, "pre_heads.": 8e-3}
OPTIM = {
    "lr": 2e-3,
    "lr_vision": 1e-3,
    "lr_projector": 4e-3,
    "lr_heads": 8e-3,
    "min_lr_ratio": 0.1,
    "weight_decay": 0.1,
    # Large: with a small one AdamW makes steps of equal size of gradients that are nothing but rounding.
    "eps": 1e-3,
    "clip_grad": 0.5,
}


def plain_training(
    state: dict[str, torch.Tensor], config: ReferenceConfig, steps: Steps, trained: set[str]
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The losses before every step, and the weights after the last."""
    weights = {name: value.double() for name, value in state.items()}
    first, second = ({name: torch.zeros_like(weights[name]) for name in trained} for _ in range(2))
    losses = []
    for step, data in enumerate(steps):
        answer = oracle(weights, config, data)
        losses.append({"lm": answer["loss_lm"].item(), "pre": answer["loss_pre"].item()})
        gradients = {name: answer["grads"][name].double() for name in trained}
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        clip = min(1.0, OPTIM["clip_grad"] / (norm.item() + 1e-6))
        fall = 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        for name, gradient in gradients.items():
            peak = next(rate for prefix, rate in RATES.items() if name.startswith(prefix))
            rate = peak * (0.1 + 0.9 * fall)
            gradient = clip * gradient
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient.square()
            root = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + OPTIM["eps"]
            if weights[name].ndim > 1:
                weights[name] = weights[name] * (1 - rate * OPTIM["weight_decay"])
            weights[name] = weights[name] - rate * first[name] / (1 - 0.9 ** (step + 1)) / root
    return losses, weights


@pytest.mark.core
@pytest.mark.parametrize(
    "layout, more",
    [
        *((layout, {}) for layout in ("one-rank", "TP2-SP", "PP2", "PP2-VPP2", "DP2-sharded-optimizer")),
        ("one-rank", {"distributed_optimizer": True}),  # which on CPUs does not gather its parameters from itself
    ],
)
def test_six_steps_with_a_rate_by_module_are_a_plain_adamws(layout, more):
    job, config = case(layout, (2, 4), parallel=more)
    job = replace(job, steps=job.steps * 2, optim=OPTIM, trains=True)
    records = run(job)
    after = assemble([rank.weights for rank in records[-1]])
    trained = set(assemble([rank.gradients for rank in records[0]]))
    losses, expected = plain_training(job.state, config, job.steps, trained)
    for step, (ranks, loss) in enumerate(zip(records, losses, strict=True)):
        found = ranks[0].metrics
        assert found["reduced_train_loss"] == pytest.approx(loss["lm"], rel=10 * LOSS_LM), step
        assert found.get("pre/loss", 0.0) == pytest.approx(loss["pre"], abs=10 * LOSS_PRE), step
    moved = {name: expected[name] - job.state[name].double() for name in expected}
    total = torch.stack([movement.norm() for movement in moved.values()]).norm()
    wrong = {}
    for name, value in after.items():
        error = (value.double() - expected[name]).norm()
        rounding = len(records) * ROUNDING * expected[name].norm()
        if not error <= GRADIENT * moved[name].norm() + NOISE * total + rounding:
            wrong[name] = (error / moved[name].norm()).item()
    assert not wrong
    assert min(moved[name].norm() / expected[name].norm() for name in trained if "k_proj.bias" not in name) > 1e-5
