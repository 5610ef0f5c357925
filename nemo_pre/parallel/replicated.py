"""Modules that every tensor-parallel rank holds whole."""

from __future__ import annotations

from torch import nn


def sum_gradients_over_tensor_parallel(module: nn.Module) -> None:
    """Mark a replicated module whose tokens are scattered by sequence parallelism: each rank holds a part of its
    gradient, and Megatron sums the gradients of parameters that carry this mark."""
    for parameter in module.parameters():
        parameter.sequence_parallel = True  # type: ignore[attr-defined]
