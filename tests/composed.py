"""The published experiments' runs, composed once in a process: many tests look at all of them."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

from nemo_pre.config.compose import compose_run
from nemo_pre.config.run import RunConfig


def experiment(name: str) -> RunConfig:
    """The run of ``experiment=NAME``, to be changed at will."""
    return deepcopy(_composed(name))


@cache
def _composed(name: str) -> RunConfig:
    return compose_run([f"experiment={name}"])
