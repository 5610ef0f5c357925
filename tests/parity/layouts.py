"""The layouts in which the product is compared with the oracles, as fields of ParallelConfig.

Tests name them in a parameter ``layout``; those of one layout run one after the other (:mod:`tests.ranks.scheduling`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest

LAYOUTS: dict[str, dict[str, Any]] = {
    "one-rank": {},
    "TP2": {"tensor": 2},
    "TP2-SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP4": {"pipeline": 4},
    "PP2-VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "DP2": {"data": 2},
    "DP2-sharded-optimizer": {"data": 2, "distributed_optimizer": True},
    "TP2-PP2-SP": {"tensor": 2, "pipeline": 2, "sequence": True},
}

# What an axis of two does right alone can be wrong at four, or beside another: a factor of CP times one of DP, say.
PRODUCTS: dict[str, dict[str, Any]] = {
    "TP4-SP": {"tensor": 4, "sequence": True},
    "CP4": {"context": 4},
    "DP4-sharded-optimizer": {"data": 4, "distributed_optimizer": True},
    "TP2-SP-CP2": {"tensor": 2, "sequence": True, "context": 2},
    "PP2-CP2": {"pipeline": 2, "context": 2},
    "TP2-SP-DP2-sharded-optimizer": {"tensor": 2, "sequence": True, "data": 2, "distributed_optimizer": True},
    "PP2-VPP2-DP2-sharded-optimizer": {
        "pipeline": 2,
        "virtual_pipeline": 2,
        "data": 2,
        "distributed_optimizer": True,
    },
    "PP2-DP2-sharded-optimizer": {"pipeline": 2, "data": 2, "distributed_optimizer": True},
    "CP2-DP2-sharded-optimizer": {"context": 2, "data": 2, "distributed_optimizer": True},
    "TP2-SP-PP2-VPP2-CP2": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2, "context": 2},
    "TP4-SP-PP4": {"tensor": 4, "sequence": True, "pipeline": 4},
    "TP2-SP-PP2-CP2-DP2": {"tensor": 2, "sequence": True, "pipeline": 2, "context": 2, "data": 2},
}
EVERY_LAYOUT = LAYOUTS | PRODUCTS


def world_size(parallel: dict[str, Any]) -> int:
    return math.prod(parallel.get(axis, 1) for axis in ("tensor", "pipeline", "context", "data"))


def num_steps(parallel: dict[str, Any]) -> int:
    """How many steps of data a layout is given: all three, or the first two where more than two ranks compute them,
    which takes seconds. So the step that follows one of text alone is proven axis by axis, not for products."""
    return 3 if world_size(parallel) <= 2 else 2


# Those of the tests that hold on both backends (:mod:`tests.backend`).
CORE = ("one-rank", "TP2-SP", "PP2", "PP2-VPP2", "CP2", "DP2-sharded-optimizer", "TP2-SP-PP2-CP2-DP2")


def on_both(layouts: Iterable[str], core: Iterable[str] = CORE) -> list[Any]:
    """The layouts as parameters of a test, those in ``core`` marked to be run on plain Megatron-Core too."""
    chosen = set(core)
    return [pytest.param(name, marks=pytest.mark.core) if name in chosen else name for name in layouts]
