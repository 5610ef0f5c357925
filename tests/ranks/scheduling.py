"""Which tests follow each other, and which run on one worker of pytest-xdist: those that share something.

A parity test shares its layout's ranks (:mod:`tests.ranks.standing`), any other test the fixtures of its file. xdist's
own groups (``--dist loadgroup``) are marks that it writes into a test's name, which pytest 9.2 no longer lets it do.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.parity.layouts import EVERY_LAYOUT, world_size

PARITY = "tests/parity/"
# What a module imports to start processes, which takes longest.
STARTERS = ("run_ranks", "run_on_standing_ranks", "subprocess")
# Layouts of more ranks make one group: two of them at a time would wait for each other's ranks.
MOST_RANKS = 8


def place(item: pytest.Item) -> tuple[int, int, str]:
    """What to sort by: the longest come first, so that no worker ends long after the others."""
    layout = parity_layout(item.nodeid)
    if layout is not None:
        return 1, -world_size(EVERY_LAYOUT[layout]), layout
    if "bed" in getattr(item, "fixturenames", ()):  # jobs of a real Slurm wait for a core: beside tests that use one
        return 2, 0, ""
    starts_processes = any(hasattr(item.module, name) for name in STARTERS)
    return (0 if starts_processes else 3), 0, ""


def group(nodeid: str) -> str:
    """The name of the group of tests that one worker runs."""
    layout = parity_layout(nodeid)
    if layout is None:
        return nodeid.split("::")[0]
    return layout if world_size(EVERY_LAYOUT[layout]) <= MOST_RANKS else "many ranks"


def parity_layout(nodeid: str) -> str | None:
    """The layout that a parity test has among its parameters: the longest name that is there."""
    parameters = re.search(r"\[(.*)\]$", nodeid)
    if not nodeid.startswith(PARITY) or parameters is None:
        return None
    found = [name for name in EVERY_LAYOUT if f"-{name}-" in f"-{parameters[1]}-"]
    return max(found, key=len, default=None)


def scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's scheduler of whole groups, in the order of :func:`place`."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)
