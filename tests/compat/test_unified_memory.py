"""Importing Megatron compiles nothing, and waits for nobody who was killed while he did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

IMPORT = """
from nemo_pre.launch.environment import prepare_environment
prepare_environment("cpu")
from megatron.core.inference.contexts import dynamic_context
assert not dynamic_context.has_unified_memory
"""


def test_a_lock_that_a_killed_import_left_behind_stops_no_later_one(tmp_path: Path) -> None:
    lock = tmp_path / "managed_alloc_runtime" / "lock"
    lock.parent.mkdir()
    lock.touch()
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", IMPORT], env=environment, timeout=120, check=False)
    assert found.returncode == 0
    assert list(tmp_path.rglob("*")) == [lock.parent, lock], "something was compiled"
