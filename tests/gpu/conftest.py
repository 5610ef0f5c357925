"""What only a GPU can show: the same numbers there as on the CPU. Not part of the plain suite, which hides GPUs.

NEMO_PRE_TEST_PLATFORM=gpu python -m pytest tests/gpu
NEMO_PRE_TEST_PLATFORM=cpu python -m pytest tests/gpu     # a rehearsal: the same comparisons, CPU against CPU
"""

import os

import pytest

PLATFORM = os.environ.get("NEMO_PRE_TEST_PLATFORM")
HERE = os.path.dirname(__file__)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if str(item.path).startswith(HERE + os.sep):
            item.add_marker(pytest.mark.gpu)
            if PLATFORM is None:
                item.add_marker(pytest.mark.skip("needs a GPU: NEMO_PRE_TEST_PLATFORM=gpu python -m pytest tests/gpu"))


@pytest.fixture(scope="session")
def platform() -> str:
    import torch

    assert PLATFORM is not None
    if PLATFORM == "gpu":
        assert torch.cuda.is_available(), "NEMO_PRE_TEST_PLATFORM=gpu, but torch sees no GPU"
    return PLATFORM


@pytest.fixture(scope="session")
def device(platform: str) -> str:
    return "cuda" if platform == "gpu" else "cpu"
