"""Within which recipe of FP8 layers compute, and what delayed scaling sends, as Transformer Engine 2.9.0 does.

Files and lines are of ``transformer_engine/pytorch/`` 2.9.0. Delayed scaling scales by largest values of former
passes: every layer that computes in FP8 notes those of its tensors, and they are reduced over the ranks of the
autocast's group, all layers' in one message (``quantization.py:487``): those of the forward pass where the outermost
autocast is left with gradients enabled (``:597``), those of the backward pass at the end of that of the autocast's
first layer (``module/linear.py:961``, ``module/layernorm_linear.py:1000``). Their history is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

FORWARD, BACKWARD = 3, 2  # tensors of a matrix product, in each pass (module/base.py:767)


@dataclass
class Recipe:
    """How FP8 tensors are scaled: Transformer Engine's class of the same name, without its numbers."""

    name: str

    @property
    def blockwise(self) -> bool:
        return self.name == "blockwise"


class Autocast:
    """Within which recipe layers compute, and whether what they do now is done again in the backward pass.

    Attributes:
        recipe: None: in the precision of their weights.
        group: whose ranks scale by the same largest values.
        recomputed: the first pass of a recomputed layer, without a graph. ``again``: the second.
    """

    recipe: Recipe | None = None
    group: Any = None
    recomputed = again = False
    _depth = 0
    _first = False  # no layer whose gradients are wanted has computed since the outermost autocast was entered

    @classmethod
    @contextmanager
    def entered(cls, recipe: Recipe | None, group: Any = None) -> Iterator[None]:
        before = cls.recipe, cls.group, cls._first
        cls.recipe, cls.group = recipe, group
        if cls._depth == 0:
            cls._first = True
        cls._depth += 1
        try:
            yield
        finally:
            cls.recipe, cls.group, cls._first = before
            cls._depth -= 1
        if recipe is not None and cls._depth == 0 and torch.is_grad_enabled():
            LargestValues.reduce(FORWARD)

    @classmethod
    @contextmanager
    def recomputing(cls, again: bool) -> Iterator[None]:
        """What is computed inside is a recomputed layer's first pass, or its second."""
        before = cls.recomputed, cls.again
        cls.recomputed, cls.again = not again, again
        try:
            yield
        finally:
            cls.recomputed, cls.again = before

    @classmethod
    def reduces_in_backward(cls, wanted: bool) -> bool:
        """Whether a layer is the one at whose backward pass largest values are reduced: the first whose gradients are
        wanted, and in a recomputed layer's second pass each of them (``module/linear.py:472``)."""
        if cls.recipe is None or not wanted:
            return False
        first, cls._first = cls._first, cls._first and cls.again
        return first


class LargestValues:
    """How many largest values there are, of the layers that have computed with delayed scaling in this process."""

    _products: dict[tuple[Any, torch.device], int] = {}  # by group and device, matrix products of its layers

    @classmethod
    def of(cls, layer: Any, products: int, device: torch.device) -> None:
        """Count a layer that computes for the first time, by its matrix products (``quantization.py:350``)."""
        recipe = Autocast.recipe
        if recipe is None or recipe.name != "delayed" or Autocast.again or layer.notes_largest_values:
            return
        layer.notes_largest_values = True
        key = Autocast.group, device
        cls._products[key] = cls._products.get(key, 0) + products

    @classmethod
    def reduce(cls, tensors: int) -> None:
        """Send those of a pass to each group that has other ranks, and scale anew.

        Args:
            tensors: :data:`FORWARD` or :data:`BACKWARD`.
        """
        for (group, device), products in cls._products.items():
            largest = torch.zeros(tensors * products, dtype=torch.float32, device=device)  # put together from all
            if dist.is_initialized() and dist.get_world_size(group) > 1:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            largest.add_(0)  # one kernel makes all scales of them

    @classmethod
    def forget(cls) -> None:
        """Be as in a process in which nothing has computed."""
        cls._products.clear()
