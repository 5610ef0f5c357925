"""An exported directory tokenizes as training did: its card's snippet, its files, what transformers says of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nemo_pre.config.compose import compose_run, save_resolved
from nemo_pre.data.conversation import IMAGE_TAG, IMAGE_TOKEN_INDEX, encode_prompt, end_of_answer
from nemo_pre.data.tokenizer import load_tokenizer
from nemo_pre.huggingface.card import write_card
from nemo_pre.huggingface.exporter import write_config
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.huggingface.loading import load_processor, needs_own_code, own_files
from nemo_pre.huggingface.processor import write_processor
from nemo_pre.run_files.saved_config import read_saved
from tests.data.sentencepiece_models import write_vicuna_like
from tests.huggingface.tiny import tiny_llava

QUESTION = "What is shown in the picture?"


def exported(directory: Path, run: Any) -> Path:
    """All of an export but its weights."""
    directory.mkdir()
    checkpoint = directory.parent / "checkpoints" / "step=1"
    save_resolved(run, checkpoint / "config.yaml")
    saved = read_saved(checkpoint)
    image = write_processor(saved, run.model, checkpoint, directory).image
    write_config(directory, {"model_type": "llava", "image_token_index": image})
    write_card(directory, saved, run.model, checkpoint)
    return directory


def expanded(ids: list[int], image: int, count: int) -> list[int]:
    return [token for known in ids for token in ([image] * count if known == IMAGE_TOKEN_INDEX else [known])]


@pytest.mark.parametrize("stage", ["stage1_align", "stage2_full"])
@pytest.mark.parametrize("legacy", [True, False])
def test_the_cards_snippet_asks_llava15_with_the_ids_of_training(tmp_path, legacy, stage):
    """The snippet itself, up to the model, from a Vicuna as published."""
    from PIL import Image

    vicuna = write_vicuna_like(tmp_path / "vicuna", legacy)
    run = compose_run([f"experiment=llava15_7b_{stage}", f"model.tokenizer={vicuna}", "model.vision.image_size=28"])
    directory = exported(tmp_path / "hf", run)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    code = (directory / "README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = [line for line in code.splitlines() if "AutoModelForImageTextToText.from" not in line]
    lines = [line for line in lines if "generate" not in line and "print(" not in line]
    lines = [line.replace("picture.png", str(tmp_path / "picture.png")) for line in lines]
    names: dict[str, Any] = {"directory": str(directory)}
    exec("\n".join(lines).replace("What is in the picture?", QUESTION), names)
    ids = names["inputs"]["input_ids"][0].tolist()

    template, trained_with = run.data.chat_template, load_tokenizer(vicuna)
    asked = [{"from": "human", "value": f"{IMAGE_TAG}\n{QUESTION}"}]
    known = encode_prompt(asked, trained_with, template, 1, "here")
    image = names["processor"].tokenizer.convert_tokens_to_ids(IMAGE_TAG)
    assert ids == expanded(known, image, 4)
    ours = load_processor(directory)
    assert type(ours.tokenizer) is type(names["processor"].tokenizer) and ours.tokenizer.is_fast
    assert type(ours.image_processor) is type(names["processor"].image_processor)
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    assert end_of_answer(trained_with, template) in (ends if isinstance(ends, list) else [ends])


def large_vocabulary(directory: Path) -> Path:
    """A byte-level tokenizer of more than 100,000 tokens, as Qwen2.5's: transformers takes such for Mistral's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"unused{number}" for number in range(100_001)]
    inner = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    tokenizer = Qwen2TokenizerFast(tokenizer_object=inner, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(directory)
    return directory


def test_an_export_of_qwen_is_loaded_without_advice_that_would_change_its_ids(tmp_path, caplog, capfd):
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    source = large_vocabulary(tmp_path / "qwen")
    run = compose_run(["experiment=clip_qwen25_3b_stage2_full_pre", f"model.tokenizer={source}"])
    directory = exported(tmp_path / "hf", run)
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            for load in (
                lambda: load_tokenizer(source),
                lambda: load_processor(directory),
                lambda: AutoTokenizer.from_pretrained(directory),
                lambda: AutoProcessor.from_pretrained(directory, use_fast=True),
            ):
                load()
    finally:
        transformers_logging.disable_propagation()
    said = caplog.text + "".join(capfd.readouterr())
    assert "regex" not in said and "incorrect" not in said
    assert "fix_mistral_regex" not in (directory / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_model_without_its_whole_tokenizer_is_refused_at_import(tmp_path, name):
    directory = tiny_llava(tmp_path / "llava")
    (directory / name).unlink()
    with pytest.raises(ValueError, match=rf"the tokenizer .*llava cannot be loaded: it has no {name}"):
        import_checkpoint(str(directory), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_larger_than_its_model_is_refused_at_import(tmp_path):
    directory = tiny_llava(tmp_path / "llava")
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens([f"more{number}" for number in range(40)])
    tokenizer.save_pretrained(directory)
    with pytest.raises(ValueError, match=r"has 3\d\d tokens: set model.language.vocab_size to 3\d\d or more, not 300"):
        import_checkpoint(str(directory), str(tmp_path / "out"))


def test_only_code_that_an_export_writes_is_run(tmp_path):
    maps = {"AutoConfig": "configuration_spatial_llava.SpatialLlavaConfig"}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llava"}))
    assert not needs_own_code(tmp_path)
    config.write_text(json.dumps({"model_type": "llava", "auto_map": {"AutoConfig": "evil.Config"}}))
    assert not needs_own_code(tmp_path), "transformers' own class is taken"
    write_config(tmp_path, {"model_type": "spatial_llava", "auto_map": maps})
    assert needs_own_code(tmp_path)
    for name in own_files("spatial_llava"):
        original = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(original + b"import os\n")
        with pytest.raises(ValueError, match=f"code of its own .{name}., which is not what this version exports"):
            needs_own_code(tmp_path)
        (tmp_path / name).write_bytes(original)
    for elsewhere in ("evil.Config", "someone/else--configuration_spatial_llava.SpatialLlavaConfig"):
        config.write_text(json.dumps({"model_type": "spatial_llava", "auto_map": {"AutoConfig": elsewhere}}))
        with pytest.raises(ValueError, match="is not run"):
            needs_own_code(tmp_path)
