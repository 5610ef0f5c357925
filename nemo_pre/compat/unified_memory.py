"""Megatron-Core's import without the CUDA helper that it compiles for its inference engine. Imports nothing heavy."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from nemo_pre.compat.registry import patch

NAME = "megatron.core.inference.unified_memory"


def create_unified_mempool() -> Any:
    raise RuntimeError("nemo-pre leaves out Megatron-Core's unified memory, which only its inference engine can use")


class WithoutHelper:
    """A module with the original's two names, in its place unless that has been imported already."""

    def __init__(self) -> None:
        self.module = ModuleType(NAME)
        self.module.__dict__.update(has_unified_memory=False, create_unified_mempool=create_unified_mempool)

    def do(self) -> None:
        sys.modules.setdefault(NAME, self.module)

    def undo(self) -> None:
        if sys.modules.get(NAME) is self.module:
            del sys.modules[NAME]


@patch(
    "no-unified-memory",
    why="Importing megatron.core compiles a CUDA helper that only Megatron's inference engine uses, behind a lock file"
    " in the home directory: a process that is killed meanwhile leaves the lock there, and every later import, of all"
    " ranks on all nodes that share the home, waits for it for ever and says nothing. Where nvcc is installed and no"
    " GPU, it dies of an IndexError.",
    until="megatron.core.inference.unified_memory builds when it is used.",
    of={"megatron-core": ("0.15.3",)},
    unneeded={"megatron-core 0.19": "it compiles when it is used"},
)
def no_unified_memory():
    yield WithoutHelper()


PATCHES = [no_unified_memory]


def apply() -> None:
    """Apply this module's patches, which must happen before the first import of Megatron."""
    for each in PATCHES:
        each.apply()
