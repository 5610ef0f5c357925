"""What the ranks of tests/compat/test_layouts.py do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.compat import tiny_gpt
from tests.compat.tiny_gpt import Layout
from tests.ranks.sharded import assemble, gather_gradients, gradient_shards, load_full, weight_shards


def first_weights(layout: Layout) -> dict[str, Any]:
    """Random weights, drawn on one rank."""
    return assemble([weight_shards(tiny_gpt.modules(tiny_gpt.start(layout, use_optimizer=False)))])


def loss_and_gradients(layout: Layout, weights: dict[str, Any]) -> tuple[float, Any]:
    """The loss of the first global batch and its gradients, without an optimizer."""
    run = tiny_gpt.start(layout, use_optimizer=False)
    load_full(tiny_gpt.modules(run), weights)
    loss = tiny_gpt.forward_backward(run)
    gather_gradients(run.chunks)
    return loss, gradient_shards(tiny_gpt.modules(run))


def losses_of_steps(layout: Layout, weights: dict[str, Any], steps: int = 3) -> list[float]:
    """The losses of optimizer steps."""
    run = tiny_gpt.start(layout)
    load_full(tiny_gpt.modules(run), weights)
    run.optimizer.reload_model_params()
    return tiny_gpt.train(run, steps)


def both(layout: Layout, weights: dict[str, Any]) -> tuple[float, Any, list[float]]:
    """Loss and gradients in float64, then the losses of three optimizer steps in float32."""
    wide = {name: weight.double() for name, weight in weights.items()}
    loss, gradients = loss_and_gradients(replace(layout, precision="fp64"), wide)
    tiny_gpt.stop()
    return loss, gradients, losses_of_steps(layout, weights)
