"""Random initialisation that does not depend on the layout."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw from a generator of this module's own, so that the same weights come out on every rank and layout.

    Ranks otherwise share one stream, and how far it has advanced depends on what else the rank builds.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + zlib.crc32(name.encode()))
        yield
