"""Tokenizers of other people's making: loaded by the product's own way, or refused in one sentence that names the
directory and the cause; code beside them is not run, and nothing is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_pre.checks.presence import check_presence
from nemo_pre.config.compose import compose_run, save_resolved
from nemo_pre.data.tokenizer import conflicting_words, load_backend, load_tokenizer
from tests.data.sentencepiece_models import slow_tokenizer, write_vicuna_like
from tests.huggingface.tiny import tiny_tokenizer


@pytest.mark.parametrize("legacy", [True, False, None])
def test_a_sentencepiece_model_alone_is_loaded_as_the_slow_tokenizer_reads_it(tmp_path, legacy):
    """Vicuna as published; needs a sentencepiece and a protobuf that go together, as the lock's must."""
    directory = write_vicuna_like(tmp_path, legacy)
    tokenizer, slow = load_tokenizer(directory), slow_tokenizer(directory)
    assert tokenizer.is_fast and slow.legacy is (legacy is not False)
    for text in ("USER: What is shown?\nA car.", "</s>USER: 17 dogs", "写真 🙂\t", "A cat.</s>", "two  spaces "):
        ids = tokenizer(text)["input_ids"]
        assert ids == slow(text).input_ids, text
        assert tokenizer.unk_token_id not in ids, "every byte has a token"
    assert tokenizer("</s>USER:")["input_ids"][-2:] == slow.convert_tokens_to_ids(
        ["USER", ":"] if legacy is False else ["ER", ":"]
    )
    assert load_backend(directory).get_vocab_size() == len(tokenizer)


@pytest.fixture
def whole(tmp_path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def _without(*names: str) -> Any:
    return lambda directory: [(directory / name).unlink() for name in names]


def _with(name: str, content: bytes) -> Any:
    return lambda directory: (directory / name).write_bytes(content)


def _settings(**values: Any) -> Any:
    def change(directory: Path) -> None:
        file = directory / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n"
BROKEN = {
    "no vocabulary": (_without("tokenizer.json"), "it has no tokenizer.json, nor tokenizer.model, nor vocab.json"),
    "no settings": (_without("tokenizer_config.json"), "it has no tokenizer_config.json"),
    "empty": (_with("tokenizer.json", b""), "tokenizer.json is empty"),
    "cut": (_with("tokenizer.json", b'{"model": {"vo'), "tokenizer.json is not JSON"),
    "no object": (_with("tokenizer_config.json", b"[]"), "tokenizer_config.json is not a JSON object"),
    "another schema": (_with("tokenizer.json", b'{"a": 1}'), "cannot be loaded: "),
    "a pointer": (_with("tokenizer.json", LFS), "tokenizer.json is a pointer of Git LFS"),
    "a broken model": (_with("tokenizer.model", b"no model at all"), "tokenizer.model is not a model that sentencep"),
    "an unknown class": (_settings(tokenizer_class="OtherTokenizer"), "OtherTokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tokenizer_is_one_sentence_with_directory_and_cause(whole, case):
    break_it, cause = BROKEN[case]
    break_it(whole)
    if case == "a broken model":
        (whole / "tokenizer.json").unlink()
        _settings(tokenizer_class="LlamaTokenizer")(whole)
    with pytest.raises(ValueError, match=r"the tokenizer .*whole cannot be loaded: ") as refused:
        load_tokenizer(whole)
    assert cause in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("own_class", [True, False])
def test_code_beside_a_tokenizer_is_neither_run_nor_asked_for(whole, own_class, monkeypatch):
    """``own_class``: of a name that transformers does not know, so that it cannot do without the code."""
    (whole / "code.py").write_text("raise SystemExit('other people\\'s code ran')\n")
    _settings(auto_map={"AutoTokenizer": ["code.Slow", "code.Fast"]})(whole)
    if own_class:
        _settings(tokenizer_class="OwnTokenizer")(whole)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    if own_class:
        with pytest.raises(ValueError, match="cannot be loaded: .*custom code"):
            load_tokenizer(whole)
    else:
        assert len(load_tokenizer(whole)) == len(tiny_tokenizer())


def test_a_broken_tokenizer_of_the_model_is_refused_before_a_run_starts(whole, digits):
    from nemo_pre.config.compose import compose_run

    run = compose_run(["experiment=digits_tiny", f"data.path={digits}", f"model.tokenizer={whole}"])
    check_presence(run)
    (whole / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(ValueError, match=r"model.tokenizer=.* tokenizer.json is a pointer of Git LFS"):
        check_presence(run)


def test_two_tokenizers_conflict_where_an_id_is_another_word_and_not_where_one_has_more(whole, digits, tmp_path):
    more = load_tokenizer(whole)
    more.add_tokens(["aardvark"])
    more.save_pretrained(tmp_path / "more")
    assert conflicting_words(whole, tmp_path / "more") is None
    assert conflicting_words(tmp_path / "more", whole) is None
    id, ours, theirs = conflicting_words(digits / "tokenizer", whole)
    assert ours == load_backend(digits / "tokenizer").id_to_token(id) != theirs == load_backend(whole).id_to_token(id)


@pytest.mark.parametrize("kept", ["beside imported weights", "by a former stage", "with a former stage's data"])
def test_a_tokenizer_with_the_data_that_is_not_the_weights_is_refused(kept, whole, digits, digits_copy, tmp_path):
    """The weights would read other words than the data say."""
    weights = tmp_path / "weights"
    start = compose_run(["experiment=digits_tiny", f"data.path={tmp_path / 'gone'}"])
    if kept == "beside imported weights":
        known = weights / "huggingface"
        shutil.copytree(whole, known)
    elif kept == "by a former stage":
        known = start.model.tokenizer = str(whole)
    else:
        start.data.path, known = str(digits_copy), digits_copy / "tokenizer"
        shutil.copytree(whole, known, dirs_exist_ok=True)
    save_resolved(start, weights / "config.yaml")
    (weights / "weights").mkdir()
    words = ["experiment=digits_tiny", f"data.path={digits}", f"init_from={weights}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=f"is not that of the weights of init_from=.*; set model.tokenizer={known}"):
        check_presence(compose_run(words))
    assert check_presence(compose_run([*words, f"model.tokenizer={known}"])), "said so, it is the user's word"
    (tmp_path / "run" / "checkpoints" / "step=3").mkdir(parents=True)
    assert check_presence(compose_run(words)), "a run that continues has its own weights"
