"""From training to transformers: a run with PRe and LaVer, and one without, exported and asked on both sides."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nemo_pre.config.compose import compose_run, save_resolved
from nemo_pre.data.conversation import IMAGE_TOKEN_INDEX, TEMPLATES, encode, encode_prompt
from nemo_pre.data.native_images import NativeResolution
from nemo_pre.huggingface.exporter import export_checkpoint
from nemo_pre.huggingface.processor import write_processor
from nemo_pre.run_files.saved_config import saved_model
from tests.cli.in_a_rank import command_line
from tests.huggingface.megatron_ranks import Question, ask
from tests.huggingface.tiny import tiny_tokenizer
from tests.ranks import run_on_standing_ranks
from tests.training.job import train

SMALL = [
    "platform=cpu",
    "model.language.num_layers=4",
    "model.vision.num_layers=2",
    "trainer.max_steps=3",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.val_samples=8",
    "objective.pre.layers=[2]",
]
ANY_SIZE = [
    "model.vision.image_size=0",
    "model.vision.patch_size=7",
    "model.vision.drop_class_token=false",
    "model.vision.min_visual_tokens=1",
    "data.image_resize=whole",
    "model.language.family=qwen2",
    "model.language.vocab_size=300",
    "data.sequence_length=256",
]
NATIVE = [
    *ANY_SIZE,
    "model.vision.family=qwen25_vl",
    "model.vision.feature_layer=-1",
    "model.vision.max_visual_tokens=16",
    "model.vision.window_size=28",
    "model.vision.full_attention_layers=[1]",
    "model.rope=mrope",
    "data.chat_template=qwen_vl",
]
AIMV2 = [*ANY_SIZE, "model.vision.family=aimv2_native", "model.vision.max_visual_tokens=64"]
RUNS = {
    "plain": (["experiment=digits_tiny_pre", "parallel=tp2_sp"], 2),
    "spatial": (["experiment=digits-pre-laver", "objective.laver.head_hidden_width=32", "parallel=pp2"], 2),
    "native": (["experiment=digits_tiny_pre", *NATIVE, "parallel=tp2_sp"], 2),
    "aimv2": (["experiment=digits-pre-laver", "objective.laver.head_hidden_width=32", *AIMV2, "parallel=tp2_sp"], 2),
}
MODEL_TYPES = {"plain": "llava", "spatial": "spatial_llava", "native": "qwen2_5_vl", "aimv2": "spatial_qwen_vl"}
LAVER = ("spatial", "aimv2")


@pytest.fixture(scope="module", params=RUNS)
def trained(request, tmp_path_factory, digits) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp(request.param)
    overrides, ranks = RUNS[request.param]
    if request.param in ("native", "aimv2"):  # digits' own tokenizer has no markers for images
        tiny_tokenizer().save_pretrained(output / "tokenizer")
        overrides = [*overrides, f"model.tokenizer={output / 'tokenizer'}"]
    train(ranks, [*overrides, *SMALL, f"output_dir={output / 'run'}", f"data.path={digits}"])
    export_checkpoint(str(output / "run"), str(output / "hf"))
    return request.param, output


def loaded(directory: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText

    from nemo_pre.huggingface.loading import load_processor

    model = AutoModelForImageTextToText.from_pretrained(
        directory, trust_remote_code=any(directory.glob("modeling_*.py"))
    )
    return model.eval(), load_processor(directory)


def picture(digits: Path) -> tuple[Image.Image, str]:
    """The first validation sample with a picture, and its question."""
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.shards import ShardedSamples

    samples = ShardedSamples(read_manifest(digits).shards["val"])
    raw = next(sample for n in range(len(samples)) if (sample := samples.read(n)).image is not None)
    question = raw.record["conversations"][0]["value"].replace("<image>", "").strip()
    return Image.open(io.BytesIO(raw.image)).convert("RGB"), question


def test_transformers_says_what_the_trained_model_says(trained, digits):
    kind, output = trained
    model, processor = loaded(output / "hf")
    image, question = picture(digits)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    native = kind in ("native", "aimv2")
    image_id = model.config.image_token_id if native else model.config.image_token_index
    ids = inputs["input_ids"][0].tolist()
    first, count = ids.index(image_id), ids.count(image_id)
    tokens = torch.tensor([*ids[:first], IMAGE_TOKEN_INDEX, *ids[first + count :]])
    vocabulary = len(processor.tokenizer) - 1  # without the image's own
    checkpoint = next((output / "run" / "checkpoints").glob("step=*"))
    pixels, grids = inputs["pixel_values"], None
    if native:
        name = "SpatialQwenVL" if kind == "aimv2" else "Qwen2_5_VL"
        assert model.__class__.__name__ == f"{name}ForConditionalGeneration"
        merge, frames, most = (1, 1, 64) if kind == "aimv2" else (2, 2, 16)
        pixels = pixels.view(-1, merge**2, 3, frames, 7**2)[:, :, :, 0].flatten(2)  # all frames are equal
        grids = [(int(height) // merge, int(width) // merge) for _, height, width in inputs["image_grid_thw"]]
        vision = saved_model(next((output / "run" / "checkpoints").glob("step=*"))).vision
        how = (vision.image_mean, vision.image_std, "here", "bicubic")
        trained_on = NativeResolution(7, merge, 1, most).patches(image, *how)
        torch.testing.assert_close(pixels, trained_on.flatten(0, 1), rtol=0, atol=1e-6)
    (told,) = run_on_standing_ranks(ask, 1, str(checkpoint), {}, [Question(tokens, pixels, grids)], 5, vocabulary)
    with torch.no_grad():
        logits = model(**inputs).logits[0, :, :vocabulary]
    torch.testing.assert_close(told.logits[0], logits, rtol=0, atol=1e-4)
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert generated[0, len(ids) :].tolist() == told.cached[0]


def test_what_only_training_needed_stays_behind(trained):
    from nemo_pre.huggingface.safetensors_files import TensorSource

    kind, output = trained
    names = TensorSource(output / "hf").names()
    parts = ("language_model.", "vision_tower.", "multi_modal_projector.")
    if kind in ("native", "aimv2"):
        parts = ("model.", "visual.", "lm_head.")
    assert all(name.startswith(parts) for name in names)
    assert (output / "hf" / "modeling_spatial_llava.py").exists() == (kind == "spatial")
    config = json.loads((output / "hf" / "config.json").read_text())
    assert config["model_type"] == MODEL_TYPES[kind]


def test_the_card_tells_recipe_data_metrics_and_provenance(trained):
    kind, output = trained
    card = (output / "hf" / "README.md").read_text()
    experiment = "digits-pre-laver" if kind in LAVER else "digits_tiny_pre"
    for expected in (
        experiment,
        "arXiv 2603.20808",
        "| data | digits |",
        "| step | 3 of 3 |",
        "val/lm_loss",
        "transformers ",
    ):
        assert expected in card, expected
    assert ("2512.06281" in card) == (kind in LAVER) == ("trust_remote_code" in card)


def test_a_plain_load_of_a_spatial_model_is_refused_or_warned_of(trained, caplog):
    kind, output = trained
    if kind != "spatial":
        pytest.skip("a plain model is loaded plainly")
    from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageTextToText.from_pretrained(output / "hf", trust_remote_code=False)
    LlavaForConditionalGeneration.from_pretrained(output / "hf")
    assert "of type spatial_llava to instantiate a model of type llava" in caplog.text


@pytest.mark.parametrize(
    "vision, tag, per_image",
    [([], "<image>", (48 // 8) ** 2), (NATIVE, "<|image_pad|>", 9), (AIMV2, "<|image_pad|>", 36)],
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_chat_template_gives_the_tokens_of_training(template, vision, tag, per_image, tmp_path):
    """With one image, two, and none; several turns; and up to where the answer starts."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    chosen = [f"model.tokenizer={tmp_path / 'tokenizer'}", f"data.chat_template={template}"]
    config = compose_run(["experiment=digits_tiny", *vision, *chosen])
    save_resolved(config, tmp_path / "config.yaml")
    from nemo_pre.run_files.saved_config import read_saved

    (tmp_path / "hf").mkdir()
    write_processor(read_saved(tmp_path), config.model, tmp_path, tmp_path / "hf")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    tokenizer = tiny_tokenizer()
    keeps_text = TEMPLATES[template].keep_question
    for images in (0, 1, 2):
        question = "<image>\n" * images + "what is it ?"
        turns = [(question, "a seven"), ("and there ?", "nothing")] if keeps_text else [(question, "a seven")]
        if images == 0 and not keeps_text:
            continue
        messages, ours = [], []
        for asked, answered in turns:
            count = asked.count("<image>")
            content = [{"type": "image"}] * count + [{"type": "text", "text": asked.replace("<image>\n", "")}]
            messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": answered}]},
            ]
            ours += [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
        pictures = [Image.new("RGB", (42, 42), (9 * n, 0, 0)) for n in range(images)] or None

        def tokens(text: str, pictures: Any = pictures) -> list[int]:
            ids = processor(images=pictures, text=text, add_special_tokens=False)["input_ids"][0]
            image_id = processor.tokenizer.convert_tokens_to_ids(tag)
            kept: list[int] = []
            position = 0
            while position < len(ids):
                is_image = ids[position] == image_id
                kept.append(IMAGE_TOKEN_INDEX if is_image else ids[position])
                position += per_image if is_image else 1
            return kept

        whole = encode(ours, tokenizer, template, 4000, images, "here")
        answered = [*whole.tokens, whole.labels[-1]]
        assert tokens(processor.apply_chat_template(messages)) == answered
        prompt = encode_prompt(ours, tokenizer, template, images, "here")
        assert tokens(processor.apply_chat_template(messages[:1], add_generation_prompt=True)) == prompt


def test_generate_answers_on_the_command_line(trained, digits, tmp_path, capfd):
    """In a batch to a file, and one prompt streamed; the same answer."""
    from nemo_pre.cli import main

    kind, output = trained
    if kind == "plain":
        pytest.skip("the others are enough")
    image, question = picture(digits)
    image.save(tmp_path / "x.png")
    (tmp_path / "asked.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": text, "images": ["x.png"]}) for text in (question, "how many digits are there ?")
        )
    )
    checkpoint = str(output / "run")
    out = str(tmp_path / "answers.jsonl")
    settings = ["--max-new-tokens", "4", "platform=cpu"]
    assert main(["generate", checkpoint, "--requests", str(tmp_path / "asked.jsonl"), "--out", out, *settings]) == 0
    answers = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == [question, "how many digits are there ?"]
    words = ["generate", checkpoint, "--image", str(tmp_path / "x.png"), "--prompt", question, *settings]
    if kind == "spatial":  # as a user starts it; the others in a process that has imported NeMo already
        command = [sys.executable, "-m", "nemo_pre.cli", *words]
        streamed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        code, streamed = command_line(words)
        assert code == 0
    assert streamed == answers[0]["answer"] + "\n"
    assert main(["generate", checkpoint, f"image={tmp_path / 'none.png'}", f"prompt={question}", *settings]) != 0
    assert "none.png" in capfd.readouterr().err
