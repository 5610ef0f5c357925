"""The suite proves its claims on CPU ranks, on every machine alike: GPUs are hidden, and nothing is downloaded."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Code out of exported directories is copied there. A process has one such place: another one in the middle of the
# suite would leave half of the modules in the first.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="nemo-pre-tests-")

from nemo_pre.launch.environment import prepare_environment

# tests/gpu asks for its GPU by this variable.
prepare_environment(platform=os.environ.get("NEMO_PRE_TEST_PLATFORM", "cpu"), local_ranks=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.ranks.scheduling import place

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)  # also where xdist is not installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.ranks.scheduling import scheduler

    return scheduler(config, log)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by a test; take ``digits_copy`` for that."""
    from data_prep.digits import prepare
    from tests.data.prepared import PREPARE

    out = tmp_path_factory.mktemp("prepared") / "digits"
    prepare(out, workers=1, **PREPARE)
    return out


@pytest.fixture(scope="session")
def external_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2, for PRe's external anchor."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(image_size=28, patch_size=7, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    Dinov2Model(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]})
    )
    return path
