"""What counts as cached is what ``datasets`` reads without the network."""

import json

import pytest

from nemo_pre.evaluation.cached_data import cache_directory, how_to_get, is_cached


@pytest.mark.parametrize("repository", ["lmms-lab-encoder/POPE", "lmms-lab-encoder/SEED-Bench", "owner/ScienceQA"])
def test_a_cached_data_set_loads_offline(tmp_path, monkeypatch, repository):
    import datasets
    from datasets.naming import camelcase_to_snakecase

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert not is_cached((repository, "small"))
    (tmp_path / "data.json").write_text(json.dumps({"question": "why?"}))
    made = datasets.load_dataset(
        "json", data_files={"test": str(tmp_path / "data.json")}, cache_dir=str(tmp_path / "a")
    )
    source = tmp_path.joinpath("a")
    (arrow,) = source.rglob("*.arrow")
    owner, name = repository.split("/")
    snake = camelcase_to_snakecase(name)
    target = tmp_path / "cache" / f"{owner}___{snake}" / "small" / "0.0.0" / "0123456789abcdef"
    target.parent.mkdir(parents=True)
    arrow.parent.rename(target)
    (target / arrow.name).rename(target / f"{snake}-test.arrow")
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"dataset_name": snake, "builder_name": "json", "config_name": "small"}
    (target / "dataset_info.json").write_text(json.dumps(info))
    assert is_cached((repository, "small"))
    assert is_cached((repository, None))
    assert not is_cached((repository, "large"))
    found = datasets.load_dataset(repository, "small", cache_dir=str(tmp_path / "cache"))
    assert found["test"][:] == made["test"][:] == {"question": ["why?"]}


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "datasets"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "elsewhere"))
    assert cache_directory() == tmp_path / "elsewhere"


def test_the_way_to_get_data_is_a_command_and_a_place(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = how_to_get([("owner/POPE", None), ("owner/GQA", "images")])
    assert "load_dataset('owner/POPE')\"" in text
    assert "load_dataset('owner/GQA', 'images')\"" in text
    assert f"to {tmp_path / 'cache'}" in text
