"""Greedy generation in every layout equals running the whole sequence again, alone, for each new token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.callbacks.generation_job import GenerationJob, generate_in_training
from tests.ranks import run_on_standing_ranks
from tests.reference import tiny
from tests.reference.neva_pre import (
    IMAGE_TOKEN,
    LM,
    NO_LABEL,
    decode,
    encode_image,
    expand_sample,
    project,
    vision_tower,
)

VOCABULARY = 250  # less than the embedding's 256 rows
NEW_TOKENS = 6
CONFIG = tiny.tiny_config(pre_layers=(3,))


def prompts() -> list[tuple[Tensor, Tensor | None]]:
    """Five, of different lengths, with no, one and two images; one ends with its image, one is nearly too long."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length, where in ((4, ()), (9, (2,)), (6, (0, 3)), (5, (4,)), (18, (1,))):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        tokens[list(where)] = IMAGE_TOKEN
        size = tiny.VISION["image_size"]
        images = torch.randn(len(where), 3, size, size, generator=generator) if where else None
        made.append((tokens, images))
    return made


def labelled() -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """The prompts with the last two tokens as the answer."""
    made = []
    for tokens, images in prompts():
        labels = torch.full_like(tokens, NO_LABEL)
        if IMAGE_TOKEN not in tokens[-3:]:
            labels[-3:-1] = tokens[-2:]
        made.append((tokens, images, labels))
    return made


def logits_alone(tokens: list[int], images: Tensor | None, state: dict[str, Tensor]) -> Tensor:
    """``[s, vocabulary]`` of one sequence by the plain-torch model."""
    tower = vision_tower(CONFIG).double()
    visual = [
        project(encode_image(image, tower, state, CONFIG), state) for image in (images if images is not None else ())
    ]
    source, _, _ = expand_sample(
        tokens, [NO_LABEL] * len(tokens), [0.0] * len(tokens), tiny.TOKENS_PER_IMAGE, CONFIG.max_sequence_length
    )
    embedding = state[f"{LM}embedding.word_embeddings.weight"]
    rows = [torch.cat(visual)[index] if kind == "image" else embedding[index] for kind, index in source]
    return decode(torch.stack(rows), state, CONFIG)[0]


def generate_alone(tokens: Tensor, images: Tensor | None, state: dict[str, Tensor], stop: int) -> list[int]:
    sequence, answer = tokens.tolist(), []
    images_there = 0 if images is None else len(images)
    while len(answer) < NEW_TOKENS and len(sequence) + images_there * (tiny.TOKENS_PER_IMAGE - 1) < tiny.MAX_LENGTH:
        token = int(logits_alone(sequence, images, state)[-1, :VOCABULARY].argmax())
        if token == stop:
            break
        answer.append(token)
        sequence.append(token)
    return answer


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The weights, a token that ends one of the answers early, and what the slow reference gives."""
    state = tiny.random_state(CONFIG)
    # Padding rows of the vocabulary that would win, were they looked at.
    state[f"{LM}output_layer.weight"][VOCABULARY:] *= 50
    exact = {name: weight.double() for name, weight in state.items()}
    with torch.no_grad():
        stop = generate_alone(*prompts()[0], exact, stop=-1)[2]
        answers = [generate_alone(*prompt, exact, stop) for prompt in prompts()]
        loss, count = 0.0, 0
        for tokens, images, labels in labelled():
            log_probabilities = logits_alone(tokens.tolist(), images, exact).log_softmax(-1)
            shift = len(log_probabilities) - len(tokens)  # the labels lie behind the images
            for position in (labels != NO_LABEL).nonzero().flatten().tolist():
                loss -= float(log_probabilities[position + shift, labels[position]])
                count += 1
    return {"state": state, "stop": stop, "answers": answers, "loss": loss, "count": count}


def test_the_reference_answers_end_in_each_possible_way(expected: dict[str, Any]) -> None:
    lengths = [len(answer) for answer in expected["answers"]]
    assert lengths[0] <= 2  # the stop token
    assert lengths[4] == tiny.MAX_LENGTH - 18 - (tiny.TOKENS_PER_IMAGE - 1)  # no room left
    assert max(lengths) == NEW_TOKENS


LAYOUTS = {
    "1 rank": {},
    "pp2": {"pipeline": 2},
    "tp2+sp": {"tensor": 2, "sequence": True},
    "pp2 vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
}


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_generation_equals_the_slow_reference_and_leaves_training_alone(
    parallel: dict[str, Any], expected: dict[str, Any]
) -> None:
    job = GenerationJob(
        parallel,
        prompts(),
        labelled(),
        tiny.random_batch((1, 2), seed=1),
        expected["state"],
        VOCABULARY,
        expected["stop"],
        NEW_TOKENS,
    )
    world = parallel.get("pipeline", 1) * parallel.get("tensor", 1) * parallel.get("context", 1)
    for record in run_on_standing_ranks(generate_in_training, world, job, timeout=90):
        assert record.answers == expected["answers"]
        assert record.loss[1] == expected["count"]
        assert record.loss[0] == pytest.approx(expected["loss"], rel=1e-5)
        before, after = record.training_before_and_after
        assert before == after
        assert any(before)
        first, second = record.metrics  # the same batch and weights: the step after generation sees what the first saw
        for name in ("reduced_train_loss", "pre/loss", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-6), name
