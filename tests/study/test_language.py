"""The study's language model: what it reads, that it learns from it, and that it is made once."""

from __future__ import annotations

import pytest
import torch

from nemo_pre.config.compose import compose_run
from nemo_pre.config.run import RunConfig
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.shards import ShardedSamples
from nemo_pre.data.tokenizer import load_tokenizer, tokenizer_path
from nemo_pre.study.language import _texts, prepare_language


@pytest.fixture
def run(digits) -> RunConfig:
    return compose_run(["experiment=digits_tiny", "model.language.num_layers=2", f"data.path={digits}"])


def test_it_reads_questions_and_answers_to_their_ends_and_nothing_of_the_pictures(run, digits):
    texts = _texts(run)
    tokenizer = load_tokenizer(tokenizer_path(run))
    samples = ShardedSamples(read_manifest(digits).shards["train"])
    assert len(texts) == len(samples)
    for position in (0, 1, len(samples) - 1):
        question, answer, second, other = (turn["value"] for turn in samples.read(position).record["conversations"])
        end = tokenizer.eos_token
        expected = f"{question.replace('<image>', '')} {answer} {end} {second} {other} {end}"
        ids = texts[position][texts[position] != -100].tolist()
        without_begin = ids[1:] if ids[0] == tokenizer.bos_token_id else ids
        assert tokenizer.decode(without_begin).split() == expected.split()
    assert "image" not in tokenizer.decode(texts[texts >= 0])


def test_it_learns_and_is_made_once_for_each_seed(run, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    texts = _texts(run)[:64]

    def loss_of(seed: int, steps: int, place: str) -> float:
        directory = prepare_language(run, tmp_path / place, seed, steps, "cpu")
        model = AutoModelForCausalLM.from_pretrained(directory)
        with torch.no_grad():
            return float(model(input_ids=texts.clamp(min=0), labels=texts).loss)

    drawn, read = loss_of(1, 0, "drawn"), loss_of(1, 60, "read")
    assert drawn > 5.0  # about ln 256
    assert read < 2.0
    assert "language, seed 1: step 60/60" in capsys.readouterr().out
    assert loss_of(1, 60, "read") == read and loss_of(2, 0, "drawn") != drawn
    assert "step" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="language_seed1 was made with other options"):
        prepare_language(run, tmp_path / "read", 1, 61, "cpu")
