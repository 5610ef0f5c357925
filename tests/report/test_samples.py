"""Answers of an exported model to validation pictures."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.shards import ShardedSamples
from nemo_pre.report.samples import sample_answers

SPARE = 20  # random bytes: most are no text, so that only long answers can be told apart


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.huggingface.tiny import tiny_llava

    return tiny_llava(tmp_path_factory.mktemp("tiny") / "llava")


def test_the_first_pictures_are_asked_their_first_question(llava: Path, digits: Path) -> None:
    from PIL import Image

    rows = sample_answers(llava, digits, count=5)
    samples = ShardedSamples(read_manifest(digits).shards["val"])
    assert len(rows) == 5
    for position, row in enumerate(rows):
        raw = samples.read(position)
        question, answer = raw.record["conversations"][:2]
        assert (row.key, row.expected) == (raw.key, answer["value"])
        assert row.question == question["value"].removeprefix("<image>\n")
        assert row.question_type == raw.record["question_types"][0]
        assert raw.image is not None
        with Image.open(io.BytesIO(row.picture)) as shown, Image.open(io.BytesIO(raw.image)) as stored:
            assert shown.format == "PNG" and shown.tobytes() == stored.convert("RGB").tobytes()


def test_the_answers_are_those_of_asking_one_by_one_by_hand(
    llava: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    monkeypatch.setattr("nemo_pre.report.samples.SPARE_TOKENS", SPARE)
    rows = sample_answers(llava, digits, count=6, batch_size=6)
    assert len({len(row.question) for row in rows}) > 2
    processor = LlavaProcessor.from_pretrained(llava)
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    longest = max(len(processor.tokenizer(row.expected, add_special_tokens=False).input_ids) for row in rows)
    for row in rows:
        prompt = f"<s>USER: <image>\n{row.question} ASSISTANT:"
        image = Image.open(io.BytesIO(row.picture))
        inputs = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=longest + SPARE, do_sample=False)
        answer = processor.tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert row.answer == answer.strip()


def test_prompts_of_a_batch_are_padded_in_front_and_masked_there(
    llava: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlavaForConditionalGeneration

    seen = {}
    generate = LlavaForConditionalGeneration.generate

    def spy(self: object, **inputs: object) -> object:
        seen.update(inputs)
        return generate(self, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", spy)
    sample_answers(llava, digits, count=6, batch_size=6)
    pads = (seen["attention_mask"] == 0).sum(dim=1)
    assert pads.min() == 0 < pads.max()
    for tokens, mask, number in zip(seen["input_ids"], seen["attention_mask"], pads, strict=True):
        assert (mask[:number] == 0).all() and (mask[number:] == 1).all()
        assert (tokens[:number] == 0).all() and tokens[number] == 1  # <pad>, then one <s>
        assert (tokens == 1).sum() == 1


def test_the_answers_do_not_depend_on_the_batch(llava: Path, digits: Path) -> None:
    assert sample_answers(llava, digits, count=5, batch_size=2) == sample_answers(llava, digits, count=5, batch_size=5)


def test_samples_without_a_picture_are_passed_over_and_fewer_pictures_are_no_error(llava: Path, digits: Path) -> None:
    samples = ShardedSamples(read_manifest(digits).shards["val"])
    stored = [samples.read(position) for position in range(len(samples))]
    with_picture = [raw.key for raw in stored if raw.image is not None]
    assert 0 < len(with_picture) < len(stored)
    assert [row.key for row in sample_answers(llava, digits, count=1000, batch_size=40)] == with_picture
    assert sample_answers(llava, digits, count=0) == []


def test_other_peoples_code_is_not_run(
    llava: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    trusted = []

    def load(directory: Path, **options: object) -> object:
        trusted.append(options["trust_remote_code"])
        raise OSError("seen enough")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", load)
    own = tmp_path / "own"
    shutil.copytree(llava, own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "own.Config"}}))
    for directory in (llava, own):
        with pytest.raises(ValueError, match="cannot be loaded as an image-text-to-text model: seen enough"):
            sample_answers(directory, digits, count=1)
    assert trusted == [False, False]


def test_what_is_no_model_is_named(llava: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model=someone/llava has no config.json"):
        sample_answers("someone/llava", digits)
    bare = tmp_path / "bare"
    shutil.copytree(llava, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        sample_answers(bare, digits)
    with pytest.raises(ValueError, match="no manifest.json"):
        sample_answers(llava, tmp_path)
