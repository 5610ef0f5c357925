"""Features of the demo's data, for runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_pre.cli import main
from tests.features.made import run_words


@pytest.fixture(scope="session")
def digits_features(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32; not to be changed."""
    out = tmp_path_factory.mktemp("digits") / "features"
    assert main(["data", "features", *run_words(out, digits, f"data.features={out}"), "dtype=float32"]) == 0
    return out
