"""Rehearsed ranks have a fork server of their own: a process has one, and other tests' ranks may have started it with
Megatron as it is without Transformer Engine."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import forkserver

import pytest

OURS = forkserver.ForkServer()


@pytest.fixture(scope="module", autouse=True)
def own_fork_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ensure_running", "connect_to_new_process", "set_forkserver_preload", "get_inherited_fds"):
            patch.setattr(forkserver, name, getattr(OURS, name))
        yield
