"""``llava_v1`` and ``llava_caption`` are LLaVA-1.5, id for id and label for label: against its published procedure
with the slow tokenizer, for a SentencePiece model as Vicuna's is published, with both settings of ``legacy``."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nemo_pre.data.conversation import (
    IGNORE_INDEX,
    IMAGE_TAG,
    IMAGE_TOKEN_INDEX,
    TEMPLATES,
    encode,
    encode_prompt,
    end_of_answer,
)
from nemo_pre.data.errors import SampleError
from nemo_pre.data.tokenizer import load_tokenizer
from nemo_pre.huggingface.processor import jinja_template, mark_behind_image
from tests.data.llava_reference import generation_prompt, preprocess_plain, preprocess_v1, prompt_of
from tests.data.sentencepiece_models import slow_tokenizer, write_vicuna_like
from tests.data.test_templates import WORDS, ours
from tests.data.tokenizers import qwen_like

PER_IMAGE = 3
WHITE = ["", "", " ", "\n", "  ", "\n\n "]


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def tokenizers(request, tmp_path_factory) -> tuple[Any, Any]:
    """Ours, by the product's own way, and LLaVA's."""
    directory = write_vicuna_like(tmp_path_factory.mktemp("vicuna") / str(request.param), request.param)
    fast, slow = load_tokenizer(directory), slow_tokenizer(directory)
    assert slow.legacy is request.param
    return fast, slow


def text(rng: random.Random) -> str:
    words = rng.choice(["", " ", "\n"]).join(rng.choices([*WORDS, "USER", "▁"], k=rng.randint(1, 8)))
    return rng.choice(WHITE) + words + rng.choice(WHITE)


def conversation(rng: random.Random, image: bool) -> list[dict[str, str]]:
    """Turns with white space anywhere; the image at either end, or in the middle, of any question, or all of it."""
    turns = [(text(rng), text(rng).strip() or "No") for _ in range(rng.randint(1, 4))]
    turns = [(q, rng.choice(["", " ", "\n"]) + a + rng.choice(["", " ", "\n"])) for q, a in turns]
    if image:
        turn = rng.choice([0, 0, rng.randrange(len(turns))])
        question = turns[turn][0]
        place = rng.choice([0, len(question), rng.randint(0, len(question))])
        tag = rng.choice([IMAGE_TAG, f"{IMAGE_TAG}\n", f"\n{IMAGE_TAG}"])
        whole = rng.choice([tag, question[:place] + tag + question[place:], question[:place] + tag + question[place:]])
        turns[turn] = (whole, turns[turn][1])
    return ours(turns)


def encoded(messages: list[dict[str, str]], tokenizer: Any, template: str) -> tuple[list[int], list[int]]:
    """Our ids and labels with each label at its own token, as LLaVA has them before its model shifts them."""
    images = sum(message["value"].count(IMAGE_TAG) for message in messages[::2])
    sample = encode(messages, tokenizer, template, 9999, images, "here")
    assert not sample.cut
    return _at_their_own_places(sample.tokens, sample.labels, tokenizer, template)


def _at_their_own_places(tokens, labels, tokenizer, template):
    last = labels[-1] if labels[-1] != IGNORE_INDEX else end_of_answer(tokenizer, template)
    return [*tokens, last], [IGNORE_INDEX, *labels]


@pytest.mark.parametrize("image", [True, False])
def test_instructions(tokenizers, image):
    fast, slow = tokenizers
    for seed in range(150):
        messages = conversation(random.Random(seed), image)
        ids, labels, mismatch = preprocess_v1(messages, slow, has_image=image)
        assert not mismatch
        assert encoded(messages, fast, "llava_v1") == (ids, labels), messages


@pytest.mark.parametrize(
    ("question", "masked_by_llava"),
    [("What does USER: a ASSISTANT: b mean?", True), ("What follows ASSISTANT:", False)],
)
def test_where_llava_takes_words_of_a_text_for_its_own_the_answers_alone_are_trained_on(
    tokenizers, question, masked_by_llava
):
    """LLaVA then warns of a mismatch and masks the whole sample, or trains on its own "ASSISTANT:" too."""
    fast, slow = tokenizers
    messages = ours([(f"{IMAGE_TAG}\n{question}", "A dialogue.")])
    ids, labels, mismatch = preprocess_v1(messages, slow, has_image=True)
    assert mismatch is masked_by_llava
    found_ids, found_labels = encoded(messages, fast, "llava_v1")
    assert found_labels != labels
    assert found_ids == ids
    answer = [token for token in found_labels if token != IGNORE_INDEX]
    assert fast.decode(answer, skip_special_tokens=True).strip() == "A dialogue."


def test_captions(tokenizers):
    fast, slow = tokenizers
    mark = fast.convert_tokens_to_ids("▁The")
    for seed in range(60):
        rng = random.Random(seed)
        caption = rng.choice(["The red car", " The picture", text(rng), text(rng)])
        messages = ours([(rng.choice([f"{IMAGE_TAG}\nDescribe it.", f"Describe it.\n{IMAGE_TAG}"]), caption)])
        ids, labels = preprocess_plain(messages, slow)
        assert encoded(messages, fast, "llava_caption") == (ids, labels), caption
        if caption == "The red car":
            assert ids[:3] == [fast.bos_token_id, IMAGE_TOKEN_INDEX, mark]
        assert ids[-1] == end_of_answer(fast, "llava_caption") != fast.eos_token_id


@pytest.mark.parametrize("question", ["What is shown in the picture?", "ASSISTANT: USER", "写真"])
def test_a_model_is_asked_with_the_ids_it_was_trained_with(tokenizers, question):
    fast, slow = tokenizers
    asked = f"{IMAGE_TAG}\n{question}"
    prompt = encode_prompt([{"from": "human", "value": asked}], fast, "llava_v1", 1, "here")
    assert prompt == generation_prompt(question, slow)
    trained, _ = encoded(ours([(asked, "A dog.")]), fast, "llava_v1")
    assert trained[: len(prompt)] == prompt
    assert encode_prompt(ours([(asked, "")])[:1], fast, "llava_caption", 1, "here") == [1, IMAGE_TOKEN_INDEX]


def exported(tokenizer: Any) -> Any:
    """With the tag that an export adds."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]})
    return tokenizer


@pytest.mark.parametrize("as_parts", [True, False])
@pytest.mark.parametrize("name", ["llava_v1", "llava_caption", "vicuna_v1"])
def test_an_exported_model_is_asked_and_answers_with_the_ids_of_training(tokenizers, name, as_parts, tmp_path):
    """The exported template and tokenizer, loaded again, with every image expanded as a processor does."""
    original = load_tokenizer(tokenizers[0].name_or_path)
    exported(original).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TAG)
    mark = mark_behind_image(tokenizer, TEMPLATES[name])
    template = jinja_template(TEMPLATES[name], tokenizer_adds_bos=True, behind_image=mark)
    for seed in range(40):
        rng = random.Random(seed)
        turns = [(text(rng).replace("▁", ""), text(rng).strip() or "No") for _ in range(rng.randint(1, 3))]
        if name == "llava_caption":
            turns = turns[:1]
        question = turns[0][0].strip() if name != "vicuna_v1" else turns[0][0]
        turns[0] = (rng.choice([f"{IMAGE_TAG}\n{question}", IMAGE_TAG]), turns[0][1])
        messages = ours(turns)
        chat = [_message(message, as_parts) for message in messages]
        for count in (len(chat), 1):
            rendered = tokenizer.apply_chat_template(
                chat[:count], chat_template=template, tokenize=False, add_generation_prompt=count == 1
            )
            found = tokenizer(rendered.replace(IMAGE_TAG, IMAGE_TAG * PER_IMAGE))["input_ids"]
            if count == 1:
                known = encode_prompt(messages[:1], original, name, 1, "here")
            else:
                known = encoded(messages, original, name)[0]
            expanded = [i for token in known for i in ([image] * PER_IMAGE if token == IMAGE_TOKEN_INDEX else [token])]
            assert found == expanded, (count, messages)


def _message(message: dict[str, str], as_parts: bool) -> dict[str, Any]:
    role = {"human": "user", "gpt": "assistant"}[message["from"]]
    if not as_parts:
        return {"role": role, "content": message["value"]}
    images, rest = message["value"].count(IMAGE_TAG), message["value"].replace(IMAGE_TAG, "", 1)
    rest = rest.removeprefix("\n") if images else rest
    parts = [{"type": "image"}] * images + ([{"type": "text", "text": rest}] if rest else [])
    return {"role": role, "content": parts}


def test_several_images_of_a_question_go_to_its_front(tokenizers):
    fast, _ = tokenizers
    scattered = ours([(f"Is {IMAGE_TAG} like {IMAGE_TAG}? ", "Yes.")])
    in_front = ours([(f"{IMAGE_TAG}\n{IMAGE_TAG}\nIs  like ?", "Yes.")])
    assert encoded(scattered, fast, "llava_v1") == encoded(in_front, fast, "llava_v1")


def test_a_question_that_speaks_of_the_tag_is_text_as_in_llava(tokenizers):
    fast, slow = tokenizers
    messages = ours([(f"What does {IMAGE_TAG} mean?", f"{IMAGE_TAG} is a tag.")])
    with pytest.raises(SampleError, match="0 image.s. and 1 <image> tag"):
        encode(messages, fast, "llava_v1", 999, 0, "here")
    marked = [{**messages[0], "image_tags": False}, messages[1]]
    sample = encode(marked, fast, "llava_v1", 999, 0, "here")
    ids, labels, mismatch = preprocess_v1(messages, slow, has_image=False)
    assert not mismatch
    assert _at_their_own_places(sample.tokens, sample.labels, fast, "llava_v1") == (ids, labels)


def test_a_caption_that_ends_with_a_line_break_needs_a_tokenizer_in_which_that_is_a_token(digits):
    messages = ours([(IMAGE_TAG, "no.")])
    words = load_tokenizer(digits / "tokenizer")
    for use in (
        lambda: end_of_answer(words, "llava_caption"),
        lambda: encode(messages, words, "llava_caption", 9, 1, "k"),
    ):
        with pytest.raises(ValueError, match="no token of the tokenizer .*choose data.chat_template=caption"):
            use()
    joining = qwen_like()
    joining.add_tokens([".\n"])
    with pytest.raises(ValueError, match=r"joins the end of an answer .*choose data.chat_template=caption"):
        encode(messages, joining, "llava_caption", 9, 1, "here")


def test_the_reference_has_llavas_own_text():
    messages = ours([(f"{IMAGE_TAG}\nWhat?", "A dog."), ("And?", "A cat.")])
    assert prompt_of(messages).endswith(
        "questions. USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: And? ASSISTANT: A cat.</s>"
    )
