"""The digits task: its data, its scoring and its prompts are those of training."""

import json

import pytest
import yaml

from nemo_pre.data.conversation import IMAGE_TOKEN_INDEX, TEMPLATES, encode_prompt
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.shards import ShardedSamples
from nemo_pre.evaluation.digits import TEMPLATE, data_fingerprint, write_digits_task
from nemo_pre.evaluation.prompts import chat_message
from nemo_pre.evaluation.suites import BENCHMARKS, SUITES
from nemo_pre.evaluation.tasks.digits.task_functions import exact_match, images
from nemo_pre.huggingface.processor import jinja_template
from tests.huggingface.tiny import IMAGE_SIZE, PATCH_SIZE, tiny_processor


@pytest.fixture(scope="module")
def task(digits, tmp_path_factory):
    return write_digits_task(str(digits), tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def rows(task):
    from datasets import load_dataset

    definition = json.loads((task / "digits.yaml").read_text())
    return load_dataset(
        definition["dataset_path"], cache_dir=str(task / "cache"), split="val", **definition["dataset_kwargs"]
    )


def raw_samples(digits):
    samples = ShardedSamples(read_manifest(digits).shards["val"])
    return [samples.read(position) for position in range(len(samples))]


def test_every_val_sample_becomes_a_question_with_its_image_and_answer(digits, rows):
    raw = raw_samples(digits)
    assert len(rows) == len(raw) == read_manifest(digits).num_samples("val")
    for row, sample in zip(rows, raw, strict=True):
        question, answer = (message["value"] for message in sample.record["conversations"][:2])
        assert (row["key"], row["answer"]) == (sample.key, answer)
        assert question == ("<image>\n" if sample.image else "") + row["question"]
        assert row["question_type"] == sample.record["question_types"][0]
        assert [image.size for image in images(row)] == ([(48, 48)] if sample.image else [])
    assert {row["question_type"] for row in rows} == {"count", "exists", "place", "larger", "read", "text"}


def test_the_pixels_are_those_of_the_shard(digits, rows):
    import io

    from PIL import Image, ImageChops

    for row, sample in list(zip(rows, raw_samples(digits), strict=True))[:10]:
        if sample.image:
            original = Image.open(io.BytesIO(sample.image)).convert("RGB")
            assert ImageChops.difference(images(row)[0].convert("RGB"), original).getbbox() is None


def test_the_task_names_its_template_with_a_metric_for_every_type(task):
    definition = json.loads((task / "digits.yaml").read_text())
    assert definition["include"] == str(TEMPLATE)
    template = yaml.load(TEMPLATE.read_text().replace("!function ", ""), yaml.SafeLoader)
    metrics = [f"{entry['metric']},none" for entry in template["metric_list"]]
    assert metrics == [BENCHMARKS[name].metric for name in SUITES["digits"]]


@pytest.mark.parametrize(
    ("answer", "matched"), [("4 2", 1.0), (" 4  2. ", 1.0), ("4 2 1", 0.0), ("42", 0.0), ("", 0.0)]
)
def test_answers_are_normalised_as_in_training_and_count_for_their_type(answer, matched):
    row = {"answer": "4 2", "question_type": "read", "image": None}
    assert exact_match(row, [answer]) == {"exact_match": matched, "exact_match_read": matched}


def test_the_fingerprint_follows_the_val_split(digits, tmp_path):
    import shutil

    copy = shutil.copytree(digits, tmp_path / "copy")
    assert data_fingerprint(str(copy)) == data_fingerprint(str(digits))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["val"]["shards"][0]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert data_fingerprint(str(copy)) != data_fingerprint(str(digits))
    with pytest.raises(ValueError, match="prepare the data first"):
        data_fingerprint(str(tmp_path))


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_the_prompt_is_the_training_prompt_token_by_token(digits, rows, template):
    """Rendered from the question by the template that an export writes."""
    processor = tiny_processor("clip")
    processor.chat_template = jinja_template(TEMPLATES[template], tokenizer_adds_bos=False)
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    num_visual = (IMAGE_SIZE // PATCH_SIZE) ** 2
    kinds = set()
    for row, sample in zip(rows, raw_samples(digits), strict=True):
        if (row["question_type"], row["image"] is None) in kinds:
            continue
        kinds.add((row["question_type"], row["image"] is None))
        message = chat_message(row["question"], len(images(row)))
        text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=images(row) or None, add_special_tokens=False)
        wanted = encode_prompt(
            sample.record["conversations"], processor.tokenizer, template, len(images(row)), sample.where
        )
        expanded = [[image_token] * num_visual if token == IMAGE_TOKEN_INDEX else [token] for token in wanted]
        assert inputs["input_ids"][0] == [token for part in expanded for token in part]
    assert len(kinds) >= 6


def test_images_take_the_places_of_their_tags_or_go_first():
    def kinds(question, num_images):
        return [part.get("text", "image") for part in chat_message(question, num_images)["content"]]

    assert kinds("what is it?", 2) == ["image", "image", "what is it?"]
    assert kinds("<image>\nwhat is it?", 1) == ["image", "what is it?"]
    assert kinds("is <image> like <image>?", 2) == ["is ", "image", " like ", "image", "?"]
    assert kinds("what does <image> mean?", 0) == ["what does  mean?"]
