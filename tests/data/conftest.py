"""A small digits dataset, prepared once for the session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep.digits import prepare
from tests.data.prepared import PREPARE


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by a test; take ``digits_copy`` for that."""
    out = tmp_path_factory.mktemp("prepared") / "digits"
    prepare(out, workers=1, **PREPARE)
    return out


@pytest.fixture
def digits_copy(digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "digits"))
