"""An encoder that can name pictures: its targets, that it learns, and what it is told apart by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_prep.emoji import prepare
from nemo_pre.study import naming
from nemo_pre.study.naming import _mirrored, _naming_loss, _targets, encoder, read_scenes, vision_config
from tests.data_prep.emoji_packages import write_all
from tests.huggingface.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "emoji"
    packages = str(write_all(tmp_path_factory.mktemp("packages")))
    prepare([packages], out, num_scenes=120, held_out_style="twitter", held_out_concepts=0.25)
    return out


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("language")
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_a_patch_is_taught_the_picture_that_the_scene_says_is_there(emoji):
    scenes = read_scenes(emoji, "train", vision_config(48, 16, 64, 1))
    names = sorted({name for of in scenes.names for name in of})
    colours = sorted({colour for of in scenes.colours for colour in of if colour})
    concepts, of_colours = _targets(scenes, names, colours)
    for scene, of in enumerate(scenes.names):
        for patch, instance in enumerate(scenes.instances[scene].tolist()):
            expected = 0 if instance == 0 else -1 if instance < 0 else 1 + names.index(of[instance - 1])
            assert concepts[scene, patch] == expected
            colour = scenes.colours[scene][instance - 1] if instance > 0 else None
            assert of_colours[scene, patch] == (colours.index(colour) if colour else -1)
    assert scenes.coverage[0, : len(scenes.names[0])].sum(1).tolist() == pytest.approx([1.0] * len(scenes.names[0]))


def test_a_mirror_moves_patches_as_it_moves_pixels():
    pixels = torch.arange(4.0).view(1, 1, 2, 2)
    mirrored, grid = _mirrored(pixels, torch.arange(4)[None])
    assert mirrored.flatten().tolist() == grid.flatten().tolist() == [1, 0, 3, 2]


def test_patches_that_show_nothing_weigh_little_and_unclear_ones_nothing():
    scores = torch.randn(6, 4)
    concepts = torch.tensor([0, 0, 0, 2, -1, -1])
    cross = torch.nn.functional.cross_entropy
    expected = cross(scores[3:4], concepts[3:4]) + naming.BLANK_WEIGHT * cross(scores[:3], concepts[:3])
    torch.testing.assert_close(_naming_loss(scores, concepts), expected)
    assert _naming_loss(scores, torch.full((6,), -1)) == 0


def test_it_learns_and_is_a_tower_that_can_be_imported(emoji, language, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(naming, "LEARNING_RATE", 3e-3)
    encoder(str(emoji), str(language), str(tmp_path / "out"), steps=60, image_size=48, width=64, layers=1)
    told = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert told["concepts"] == 21 and told["steps"] == 60
    # The styles' figures are alike here: one of 21 names is right by chance for 5%, one of 4 colours for a fourth.
    assert told["accuracy"]["val"]["colour"] > 0.6 and told["accuracy"]["val"]["among 5"] > 0.4
    assert {"val", "val_style", "val_concept"} <= told["accuracy"].keys()
    from transformers import SiglipVisionModel

    assert SiglipVisionModel.from_pretrained(tmp_path / "out" / "vision").config.hidden_size == 64
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"next: nemo-pre import vision={tmp_path / 'out' / 'vision'} language={language}" in last


@pytest.mark.parametrize(
    "options, told",
    [
        ({"image_size": 50}, "image_size=50 is no multiple of patch_size=16"),
        ({"width": 100}, "width=100 is no multiple of 64"),
        ({"language": "nowhere"}, "language=nowhere is no Hugging Face directory"),
    ],
)
def test_wrong_options_are_one_sentence_each(emoji, language, tmp_path, options, told):
    places = {"data": str(emoji), "language": str(language), "out": str(tmp_path / "out"), "steps": 1}
    with pytest.raises(ValueError, match=told):
        encoder(**{**places, **options})
    assert not (tmp_path / "out").exists()


def test_scenes_without_names_are_refused(digits, language, tmp_path):
    with pytest.raises(ValueError, match="holds no scenes of named pictures"):
        encoder(str(digits), str(language), str(tmp_path / "out"))


def test_a_split_without_a_picture_is_refused(emoji, monkeypatch):
    monkeypatch.setattr(naming, "_read_one", lambda *_: iter(()))
    with pytest.raises(ValueError, match=r"has no picture in its split val: prepare it anew with nemo-pre data emoji"):
        read_scenes(str(emoji), "val", vision_config(96, 16, 64, 1))


def test_a_killed_teaching_goes_on_where_it_was(tmp_path, monkeypatch):
    from nemo_pre.teaching import training

    def weights(kill_at: int | None) -> torch.Tensor:
        """Of a map that is taught for six steps, killed before one of them and taught again."""
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)
        taken = 0

        def loss() -> torch.Tensor:
            nonlocal taken
            if taken == kill_at:
                raise KeyboardInterrupt
            taken += 1
            return layer(torch.rand(4, 3)).square().mean()

        state = tmp_path / "state.pt"
        try:
            training.train(layer.parameters(), loss, 6, 0.1, "toy", state)
        except KeyboardInterrupt:
            assert state.is_file()
            layer = torch.nn.Linear(3, 1)  # another process's
            kill_at = None
            training.train(layer.parameters(), loss, 6, 0.1, "toy", state)
        assert not state.exists()
        return layer.weight.detach()

    monkeypatch.setattr(training, "SAVE_EVERY", -1.0)
    torch.testing.assert_close(weights(kill_at=4), weights(kill_at=None), rtol=0, atol=0)
    layer = torch.nn.Linear(3, 1)
    training._save(tmp_path / "state.pt", {}, 1, [*layer.parameters()], torch.optim.SGD([torch.zeros(1)]), _Nothing())
    with pytest.raises(ValueError, match="is of a training with other options"):
        training.train(
            layer.parameters(), lambda: layer(torch.rand(4, 3)).mean(), 6, 0.1, "toy", tmp_path / "state.pt"
        )


class _Nothing:
    def state_dict(self) -> dict[str, int]:
        return {}
