"""What is taken from transformers' models is what these models say themselves; a patch's class is what it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_pre.diagnostics.huggingface import HuggingFaceModel
from nemo_pre.diagnostics.samples import DiagnosticSample
from tests.diagnostics.tiny_models import written

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "aimv2", "internvl")
QUESTIONS = ("<image>\nhow many?", "<image>\nis there a dog to the left of the cat?")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> HuggingFaceModel:
    return HuggingFaceModel(written(request.param, tmp_path_factory.mktemp(request.param) / "hf"), background=None)


def quadrants(size: int = 48) -> Image.Image:
    """The classes 1, 2 above 3, 4."""
    mask = np.kron(np.array([[1, 2], [3, 4]], np.uint8), np.ones((size // 2, size // 2), np.uint8))
    return Image.fromarray(mask)


def samples() -> list[DiagnosticSample]:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)) for _ in QUESTIONS]
    pairs = zip(pictures, QUESTIONS, strict=True)
    return [DiagnosticSample(str(n), *pair, quadrants(), torch.zeros(0)) for n, pair in enumerate(pairs)]


@torch.no_grad()
def test_states_words_and_attention_are_those_of_the_model(model):
    (sample, *_) = samples()
    states = model.states([sample], everything=True)
    inputs = model._inputs([sample])
    output = model.network(**inputs, output_hidden_states=True, output_attentions=True)
    is_visual = (inputs["input_ids"][0] == model._image_token).tolist()
    where = [n for n, visual in enumerate(is_visual) if visual]
    assert sorted(states.layers) == list(range(model.num_layers + 1))
    for layer in range(model.num_layers):
        torch.testing.assert_close(states.layers[layer], output.hidden_states[layer][0, where])
    last = model._decoder.norm(states.layers[model.num_layers])  # transformers' last state is behind the final norm
    torch.testing.assert_close(last, output.hidden_states[-1][0, where])
    scores = output.logits[0, where, : model.vocabulary].clone()
    scores[:, [n for n in [model._image_token] if n < model.vocabulary]] = float("-inf")
    assert states.words.tolist() == scores.argmax(1).tolist()
    asking = [n for n in range(len(is_visual)) if n > where[-1]]
    for layer in range(1, model.num_layers + 1):
        expected = output.attentions[layer - 1][0][:, asking][:, :, where].sum(2).mean(1)
        torch.testing.assert_close(states.attention[layer][0].float(), expected)


def test_a_batch_of_questions_of_different_lengths_gives_what_each_gives_alone(model):
    together = model.states(samples(), everything=True)
    alone = [model.states([sample], everything=True) for sample in samples()]
    for layer in (0, model.num_layers):
        expected = torch.cat([states.layers[layer] for states in alone])
        torch.testing.assert_close(together.layers[layer], expected, rtol=0, atol=1e-4)
    expected_mass = torch.cat([states.attention[2] for states in alone])
    torch.testing.assert_close(together.attention[2], expected_mass, rtol=0, atol=1e-5)
    assert together.image.tolist() == [0] * len(alone[0].image) + [1] * len(alone[1].image)


def test_every_patch_has_the_class_of_its_quadrant(model):
    states = model.states(samples()[:1], everything=False)
    grid = states.grids[0]
    found = states.classes[grid.first : grid.first + grid.size].reshape(grid.rows, grid.columns)
    half = grid.rows // 2
    expected = torch.tensor([[1, 2], [3, 4]]).repeat_interleave(half, 0).repeat_interleave(half, 1)
    assert found.tolist() == expected.tolist()
    assert (states.classes[: grid.first] == -1).all() and (states.classes[grid.first + grid.size :] == -1).all()


def test_a_mask_is_cropped_as_the_picture_is(tmp_path: Path):
    from transformers import CLIPImageProcessor

    directory = written("llava", tmp_path / "hf")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(directory)
    stripes = np.repeat(np.array([[1] * 24 + [2] * 48 + [3] * 24], np.uint8), 48, axis=0)
    sample = DiagnosticSample("0", Image.new("RGB", (96, 48)), QUESTIONS[0], Image.fromarray(stripes), torch.zeros(0))
    states = HuggingFaceModel(directory, background=None).states([sample], everything=False)
    assert set(states.classes.tolist()) == {2}


def test_what_is_no_model_is_one_clear_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded as an image-text-to-text model"):
        HuggingFaceModel(tmp_path, background=None)
