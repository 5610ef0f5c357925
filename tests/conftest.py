"""The suite proves its claims on CPU ranks, on every machine alike: GPUs are hidden, and nothing is downloaded."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from nemo_pre.launch import prepare_environment

prepare_environment(platform="cpu", local_ranks=2)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by a test; take ``digits_copy`` for that."""
    from data_prep.digits import prepare
    from tests.data.prepared import PREPARE

    out = tmp_path_factory.mktemp("prepared") / "digits"
    prepare(out, workers=1, **PREPARE)
    return out
