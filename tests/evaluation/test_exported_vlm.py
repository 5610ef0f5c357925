"""The adapter answers as the model by itself does, in any batch, for the plain model and for our own code."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from nemo_pre.config.derived import axis_of_frequency
from nemo_pre.huggingface.exporter import copy_own_code
from tests.diagnostics.tiny_models import written
from tests.evaluation.conftest import FAKE
from tests.huggingface.tiny import IMAGE_SIZE, tiny_llava

TOKENS = 12
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False}


@pytest.fixture(scope="module")
def adapter_class():
    """Of the installed lmms-eval, or on the fake's base class."""
    if importlib.util.find_spec("lmms_eval") is None:
        sys.path.insert(0, str(FAKE))
    from nemo_pre.evaluation.models import AVAILABLE_MODELS
    from nemo_pre.evaluation.models.exported_vlm import ExportedVLM

    assert {"exported_vlm": ExportedVLM.__name__} == AVAILABLE_MODELS
    yield ExportedVLM
    if str(FAKE) in sys.path:
        sys.path.remove(str(FAKE))
        for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_eval"]:
            del sys.modules[name]


def spatial_directory(plain: Path, directory: Path) -> Path:
    """The same weights as a model with mixed attention and positions in two dimensions."""
    shutil.copytree(plain, directory)
    copy_own_code("spatial_llava", directory)
    config = json.loads((plain / "config.json").read_text())
    name = "SpatialLlavaForConditionalGeneration"
    config |= {"model_type": "spatial_llava", "architectures": [name]}
    config |= {"visual_attention": "mixed", "visual_rope": "2d", "tile_grid": [4, 4]}
    config["rope_axes"] = axis_of_frequency("2d", None, 4)
    config["auto_map"] = {
        "AutoConfig": "configuration_spatial_llava.SpatialLlavaConfig",
        "AutoModelForImageTextToText": f"modeling_spatial_llava.{name}",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def lively(directory: Path) -> Path:
    """Weights so large that answers differ."""
    from transformers import AutoModelForImageTextToText

    own_code = any(directory.glob("modeling_*.py"))
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=own_code)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1 if parameter.ndim == 1 else 0.2)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["llama, clip", "qwen2, siglip", "spatial"])
def directory(request, tmp_path_factory, tiny_model) -> Path:
    root = tmp_path_factory.mktemp("models")
    if request.param == "spatial":
        return spatial_directory(tiny_model, root / "spatial")
    language, vision = request.param.split(", ")
    return tiny_llava(root / language, language, vision)


def adapter_of(adapter_class, directory: Path, **options):
    """Made to answer in letters: a random model's bytes are mostly no text, and all would look alike."""
    adapter = adapter_class(str(directory), device="cpu", **options)
    vocabulary = adapter.processor.tokenizer.get_vocab()
    letters = {number for token, number in vocabulary.items() if token.isascii() and token.isalnum()}
    adapter.model.generation_config.suppress_tokens = sorted(set(range(300)) - letters)
    return adapter


def picture(number: int) -> Image.Image:
    pixels = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


QUESTIONS = [  # text, numbers of images
    ("what is it?", [1]),
    ("what comes after 4?", []),
    ("is <image> like <image>, or is it not?", [2, 3]),
    ("which digit is at the top left of this scene?", [4]),
    ("?", [5]),
]


def requests(adapter, settings=GREEDY, targets=None):
    adapter.task_dict = {"quiz": {"val": [{"images": numbers} for _, numbers in QUESTIONS]}}

    def visuals(row):
        return [picture(number) for number in row["images"]]

    questions = zip(QUESTIONS, targets or [settings] * len(QUESTIONS), strict=True)
    return [
        SimpleNamespace(args=(text, second, visuals, number, "quiz", "val"))
        for number, ((text, _), second) in enumerate(questions)
    ]


def test_a_batch_gives_the_answers_of_one_at_a_time_in_the_order_of_the_questions(adapter_class, directory):
    check_batch(adapter_class, directory)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "aimv2"])
def test_so_does_a_batch_of_images_at_native_resolution(family, adapter_class, tmp_path):
    check_batch(adapter_class, lively(written(family, tmp_path / "native")))


def check_batch(adapter_class, directory):
    one = adapter_of(adapter_class, directory, batch_size=1)
    many = adapter_of(adapter_class, directory, batch_size=4)
    answers = one.generate_until(requests(one))
    assert len(set(answers)) >= len(QUESTIONS) - 1
    assert [len(answer) for answer in answers] == [TOKENS] * len(QUESTIONS)
    assert many.generate_until(requests(many)) == answers


def test_an_answer_is_the_greedy_one_of_the_whole_prompt(adapter_class, directory):
    """One token after the other from full forward passes, without padding and without a cache."""
    adapter = adapter_of(adapter_class, directory, batch_size=3)
    answers = adapter.generate_until(requests(adapter))
    processor, model = adapter.processor, adapter.model
    for (question, numbers), answer in zip(QUESTIONS[:3], answers, strict=False):
        pieces = question.split("<image>")
        head = "<image>\n" * len(numbers) if len(pieces) == 1 else ""
        text = head + "<image>\n".join(pieces)
        images = [picture(number) for number in numbers]
        inputs = processor(text=f"<s>USER: {text} ASSISTANT:", images=images or None, return_tensors="pt")
        ids, suppressed = inputs.pop("input_ids"), model.generation_config.suppress_tokens
        inputs.pop("attention_mask")
        start = ids.shape[1]
        for _ in range(TOKENS):
            logits = model(input_ids=ids, **inputs).logits[0, -1]
            logits[suppressed] = -torch.inf
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        assert answer == processor.decode(ids[0, start:], skip_special_tokens=True)


def test_answers_end_before_the_tasks_stop_words(adapter_class, directory):
    adapter = adapter_of(adapter_class, directory, batch_size=2)
    whole = adapter.generate_until(requests(adapter))
    stop = whole[0][len(whole[0]) // 2]
    cut = adapter.generate_until(requests(adapter, {**GREEDY, "until": [stop]}))
    assert cut == [answer.split(stop)[0].strip() for answer in whole]


def test_a_likelihood_is_the_mean_cross_entropy_of_the_answer_and_its_end(adapter_class, tiny_model):
    adapter = adapter_class(str(tiny_model), device="cpu")
    found = adapter.loglikelihood(requests(adapter, targets=["4 2", " yes", "no", lambda row: "1", "7"]))
    processor, model = adapter.processor, adapter.model
    for number, answer in ((0, "4 2"), (1, "yes"), (3, "1")):  # a target may begin with a blank, or be a function
        question, numbers = QUESTIONS[number]
        prompt = "<s>USER: " + "<image>\n" * len(numbers) + f"{question} "
        images = [picture(each) for each in numbers]
        inputs = processor(text=f"{prompt}ASSISTANT: {answer} ", images=images or None, return_tensors="pt")
        log_probabilities = torch.log_softmax(model(**inputs).logits[0].detach().double(), dim=-1)
        ids = inputs["input_ids"][0]
        answered = len(processor.tokenizer(f" {answer} ", add_special_tokens=False)["input_ids"])
        losses = [-log_probabilities[place - 1, ids[place]] for place in range(len(ids) - answered, len(ids))]
        assert found[number].text[0] == pytest.approx(float(sum(losses) / len(losses)), rel=1e-5)
        assert found[number].text[1] is False


def test_videos_are_refused(adapter_class, tiny_model):
    adapter = adapter_class(str(tiny_model), device="cpu")
    adapter.task_dict = {"films": {"val": [{}]}}
    request = SimpleNamespace(args=("what happens?", GREEDY, lambda row: ["film.mp4"], 0, "films", "val"))
    with pytest.raises(ValueError, match="Task films shows something other than images"):
        adapter.generate_until([request])


def test_a_name_that_is_no_directory_is_refused(adapter_class):
    """So that no code is fetched from anywhere."""
    with pytest.raises(ValueError, match="has no config.json"):
        adapter_class("someone/some-model")


@pytest.mark.parametrize("template_writes_it", [True, False])
def test_a_prompt_begins_with_one_bos_token_whoever_writes_it(adapter_class, tiny_model, template_writes_it):
    from tokenizers.processors import TemplateProcessing

    adapter = adapter_class(str(tiny_model), device="cpu")
    tokenizer = adapter.processor.tokenizer
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    if not template_writes_it:
        adapter.processor.chat_template = adapter.processor.chat_template.replace("{{ bos_token }}", "")
    prompt = adapter._render({"role": "user", "content": [{"type": "text", "text": "hm"}]})
    ids = adapter._inputs([prompt], [])["input_ids"][0].tolist()
    assert ids.count(bos) == 1
    assert ids[0] == bos


def test_pictures_keep_to_the_size_of_the_tower(adapter_class, tiny_model):
    adapter = adapter_class(str(tiny_model), device="cpu")
    inputs = adapter._inputs(["<image>\n?"], [picture(0)])
    assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
