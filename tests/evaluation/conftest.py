from pathlib import Path

import pytest

from tests.huggingface.tiny import tiny_llava

FAKE = Path(__file__).with_name("fake_harness")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("exported") / "tiny")


@pytest.fixture
def fake_harness(tmp_path, monkeypatch) -> Path:
    """Makes this interpreter one that has lmms-eval 0.7.3 (a fake); returns the log of its command lines."""
    site = tmp_path / "site"
    (site / "lmms_eval-0.7.3.dist-info").mkdir(parents=True)
    (site / "lmms_eval-0.7.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: lmms-eval\nVersion: 0.7.3\n"
    )
    (site / "lmms_eval").symlink_to(FAKE / "lmms_eval", target_is_directory=True)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("FAKE_HARNESS_LOG", str(tmp_path / "calls.jsonl"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "calls.jsonl"


@pytest.fixture
def cached_data(tmp_path, monkeypatch):
    """Puts finished data sets into the cache of the fake's tasks, or those that are named."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def put(*names: str) -> None:
        for name in names or ("GQA/questions", "GQA/pictures", "POPE/default", "MME/default"):
            repository, configuration = name.split("/")
            folder = tmp_path / "cache" / f"lmms-lab-encoder___{repository.lower()}" / configuration / "0.0.0" / "abc"
            folder.mkdir(parents=True)
            (folder / "data.arrow").touch()

    return put
