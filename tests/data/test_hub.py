"""A hub name is found, or refused at once."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import pytest

from nemo_pre.data import hub
from nemo_pre.data.tokenizer import load_tokenizer, tokenizer_path


@pytest.fixture
def unreachable(monkeypatch):
    """A hub at a port where nothing listens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", HUB)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


HUB = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"


def test_a_hub_that_does_not_answer_is_one_sentence_at_once(unreachable, capfd, caplog):
    seconds = []
    for find in (
        lambda: load_tokenizer("nobody/nothing"),  # with the import of transformers
        lambda: load_tokenizer("nobody/nothing"),
        lambda: hub.find_hf_file("model.tokenizer", "nobody/nothing", "tokenizer_config.json"),
    ):
        begin = time.monotonic()
        with pytest.raises(ValueError, match="tokenizer=nobody/nothing is neither .*127.0.0.1:9 does not answer: "):
            find()
        seconds.append(time.monotonic() - begin)
    assert max(seconds[1:]) < 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Retrying" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["nobody/a b", "a=b/c", "x", "a/b/c", "./x/y", "~/x", "ä/b"])
def test_what_cannot_be_a_hub_name_is_refused_without_asking(name, unreachable):
    assert not hub.may_be_hub_name(name)
    with pytest.raises(ValueError, match="does not exist: name a transformers model's directory, or a hub id"):
        hub.find_hf_file("model.tokenizer", name, "config.json")


def test_the_tokenizer_that_weights_came_with_is_found(digits, tmp_path):
    """Beside an import, wherever it was moved; of a former stage as its run has it; the data's own goes before."""
    import json

    from nemo_pre.checks.presence import check_presence
    from nemo_pre.config.compose import compose_run, save_resolved

    data = shutil.copytree(digits, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    imported, stage = tmp_path / "imported=1", tmp_path / "stage"
    for checkpoint in (imported, stage):
        (checkpoint / "weights").mkdir(parents=True)
    shutil.copytree(digits / "tokenizer", imported / "huggingface")
    words = ["experiment=digits_tiny", f"data.path={data}"]
    save_resolved(compose_run([*words, "model.tokenizer=/moved/away"]), imported / "config.yaml")
    save_resolved(compose_run([*words, f"init_from={imported}"]), stage / "config.yaml")

    assert tokenizer_path(compose_run([*words, f"init_from={imported}"])) == str(data / "tokenizer")
    (data / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": None}))
    for start in (imported, stage):
        run = compose_run([*words, f"init_from={start}"])
        assert tokenizer_path(run) == str(imported / "huggingface")
        check_presence(run)
        assert run.model.tokenizer == str(imported / "huggingface")  # so that its checkpoints say it
    with pytest.raises(ValueError, match="No tokenizer lies with data.path=.*: set model.tokenizer"):
        tokenizer_path(compose_run(words))
    shutil.rmtree(imported / "huggingface")
    (imported / "config.yaml").write_text((imported / "config.yaml").read_text().replace("/moved/away", "null"))
    with pytest.raises(ValueError, match="No tokenizer lies with data.path=.* nor in init_from="):
        tokenizer_path(compose_run([*words, f"init_from={imported}"]))
    assert Path(digits / "tokenizer").is_dir()
