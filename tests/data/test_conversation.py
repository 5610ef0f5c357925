"""Conversations as ids and labels, with the digits tokenizer and with one that merges spaces into words."""

from __future__ import annotations

import pytest

from nemo_pre.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode, encode_prompt
from nemo_pre.data.errors import SampleError
from nemo_pre.data.tokenizer import load_tokenizer, padding_id

NO = IGNORE_INDEX
TWO_TURNS = [
    {"from": "human", "value": "<image>\nis there a 7?"},
    {"from": "gpt", "value": "no"},
    {"from": "human", "value": "read left to right."},
    {"from": "gpt", "value": "3 5"},
]


@pytest.fixture(scope="module")
def tokenizer(digits):
    return load_tokenizer(digits / "tokenizer")


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Like Qwen's and GPT's: the space before a word is part of its token, and there is no bos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(["ASSISTANT: no USER: is there a 7? read left to right."] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def _words(tokenizer, ids):
    return ["<image>" if i == IMAGE_TOKEN_INDEX else tokenizer.convert_ids_to_tokens(i) for i in ids if i != NO]


def test_plain_by_hand(tokenizer):
    encoded = encode(TWO_TURNS, tokenizer, "plain", 40, num_images=1, where="s")
    words = [
        "<s>",
        "<image>",
        "is",
        "there",
        "a",
        "7",
        "?",
        "no",
        "</s>",
        "read",
        "left",
        "to",
        "right",
        ".",
        "3",
        "5",
    ]
    assert _words(tokenizer, encoded.tokens) == words
    no, three, five, end = tokenizer.convert_tokens_to_ids(["no", "3", "5", "</s>"])
    expected = [NO] * 6 + [no, end] + [NO] * 5 + [three, five, end]
    assert encoded.labels == expected
    assert not encoded.cut


def test_vicuna_trains_on_answers_only(tokenizer):
    encoded = encode(TWO_TURNS, tokenizer, "vicuna_v1", 99, num_images=1, where="s")
    text = " ".join(_words(tokenizer, encoded.tokens))
    assert text.startswith("<s> A chat between a curious user")
    assert text.endswith(
        "USER : <image> is there a 7 ? ASSISTANT : no </s> USER : read left to right . ASSISTANT : 3 5"
    )
    assert _words(tokenizer, encoded.labels) == ["no", "</s>", "3", "5", "</s>"]
    for position, label in enumerate(encoded.labels[:-1]):
        if label != NO:
            assert encoded.tokens[position + 1] == label, "a label is the next token"


def test_the_caption_template_leaves_the_image_alone(tokenizer):
    encoded = encode(TWO_TURNS[:2], tokenizer, "caption", 40, num_images=1, where="s")
    assert _words(tokenizer, encoded.tokens) == ["<s>", "<image>", "no"]
    assert _words(tokenizer, encoded.labels) == ["no", "</s>"]


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "caption"])
def test_the_prompt_is_what_comes_before_the_first_target(tokenizer, byte_tokenizer, template):
    for tok in (tokenizer, byte_tokenizer):
        encoded = encode(TWO_TURNS, tok, template, 999, num_images=1, where="s")
        first_target = next(i for i, label in enumerate(encoded.labels) if label != NO)
        prompt = encode_prompt(TWO_TURNS, tok, template, num_images=1, where="s")
        assert prompt == encoded.tokens[: first_target + 1]
        assert prompt == encode_prompt(TWO_TURNS[:1], tok, template, num_images=1, where="s")


def test_a_token_that_begins_with_the_space_before_the_answer_is_a_target(byte_tokenizer):
    encoded = encode(TWO_TURNS[:2], byte_tokenizer, "vicuna_v1", 999, num_images=1, where="s")
    targets = [label for label in encoded.labels if label != NO]
    assert byte_tokenizer.decode(targets) == " no<end>"
    assert targets[-1] == byte_tokenizer.eos_token_id
    assert encoded.tokens[0] != byte_tokenizer.eos_token_id, "no bos is invented where the tokenizer has none"


def test_special_words_in_the_text_are_text(byte_tokenizer):
    turns = [{"from": "human", "value": "a <end> b"}, {"from": "gpt", "value": "no"}]
    ids = encode(turns, byte_tokenizer, "plain", 999, num_images=0, where="s").tokens
    assert byte_tokenizer.eos_token_id not in ids


def test_a_bos_that_the_template_writes_itself_is_there_once():
    """SmolLM2's is chatml's mark; prompts, samples and the exported template alike."""
    from nemo_pre.data.conversation import TEMPLATES, begins_with_bos
    from nemo_pre.huggingface.processor import jinja_template
    from tests.huggingface.tiny import tiny_tokenizer

    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    chat = [{"role": "user", "content": "What?"}]
    for bos, times in (("<s>", 1), ("<|im_start|>", 0)):
        tokenizer = tiny_tokenizer()
        tokenizer.bos_token = bos
        mark = tokenizer.convert_tokens_to_ids("<|im_start|>")
        prompt = encode_prompt(talk[:1], tokenizer, "chatml", 0, "here")
        assert prompt[: times + 2] == [tokenizer.bos_token_id] * times + [mark, *tokenizer("s").input_ids]
        assert encode(talk, tokenizer, "chatml", 200, 0, "here").tokens[: len(prompt)] == prompt
        template = TEMPLATES["chatml"]
        jinja = jinja_template(template, begins_with_bos(template, tokenizer))
        assert tokenizer.apply_chat_template(chat, chat_template=jinja, add_generation_prompt=True) == prompt
        assert not begins_with_bos(TEMPLATES["plain"], tokenizer)


def test_a_long_sample_is_cut_and_says_so(tokenizer):
    full = encode(TWO_TURNS, tokenizer, "plain", 40, num_images=1, where="s")
    cut = encode(TWO_TURNS, tokenizer, "plain", 10, num_images=1, where="s")
    assert cut.cut
    assert cut.tokens == full.tokens[:10]
    assert cut.labels == full.labels[:10]
    exactly = encode(TWO_TURNS, tokenizer, "plain", len(full.tokens), num_images=1, where="s")
    assert not exactly.cut
    with pytest.raises(SampleError, match="before its last image"):
        encode(TWO_TURNS, tokenizer, "vicuna_v1", 10, num_images=1, where="sample 5")


def test_wrong_samples_are_named(tokenizer):
    def error(turns, num_images, template="plain"):
        with pytest.raises(ValueError, match="sample k1") as caught:
            encode(turns, tokenizer, template, 40, num_images, where="sample k1")
        return str(caught.value)

    assert "1 image(s) and 0 <image> tag(s)" in error(TWO_TURNS[2:], 1)
    assert "0 image(s) and 1 <image> tag(s)" in error(TWO_TURNS[:2], 0)
    twice = [{"from": "human", "value": "<image><image> count the digits."}, TWO_TURNS[1]]
    assert "1 image(s) and 2 <image> tag(s)" in error(twice, 1)
    assert "must alternate" in error(TWO_TURNS[1:], 0)
    assert "must alternate" in error([], 0)
    assert "'from' and 'value'" in error([{"role": "user"}], 0)
    unknown = [{"from": "human", "value": "describe it."}, TWO_TURNS[1]]
    assert "does not know 'describe'" in error(unknown, 0)
    with pytest.raises(ValueError, match="chat_template=llama9"):
        encode(TWO_TURNS, tokenizer, "llama9", 40, 1, where="s")


def test_an_unknown_word_is_not_a_fault_of_the_sample(tokenizer):
    with pytest.raises(ValueError) as caught:
        encode([{"from": "human", "value": "zebra"}], tokenizer, "plain", 40, 0, where="s")
    assert not isinstance(caught.value, SampleError), "skipping every sample would hide a wrong tokenizer"


def test_the_tokenizer_is_small_and_goes_there_and_back(tokenizer):
    from data_prep.digits.questions import corpus

    assert len(tokenizer) <= 256
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<pad>", "<s>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert all(len(tokenizer(str(digit))["input_ids"]) == 1 for digit in range(10))
    for sentence in set(corpus()):
        if "ASSISTANT" in sentence or "<|" in sentence or not sentence.strip():
            continue  # of templates, whose spaces are not a sentence's
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == sentence
    assert tokenizer.decode(tokenizer("3 1 4")["input_ids"]) == "3 1 4"


def test_a_tokenizer_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_text_is_padded_even_where_the_tokenizer_has_no_pad(byte_tokenizer, tokenizer):
    assert padding_id(byte_tokenizer) == byte_tokenizer.eos_token_id
    assert padding_id(tokenizer) == 0
