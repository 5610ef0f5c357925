"""``nemo-pre teach``: a tower learns of scenes, is measured on others, and comes with where it is from."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from nemo_pre.cli import main
from nemo_pre.config.compose import compose_run
from nemo_pre.data.manifest import read_manifest
from nemo_pre.diagnostics.patches import NOTHING
from nemo_pre.teaching.labels import NO_OBJECT
from nemo_pre.teaching.scenes import Scenes, names_of, read_scenes
from nemo_pre.teaching.teach import read_provenance
from nemo_pre.teaching.teacher import Teacher, measure

SMALL = ("experiment=digits_tiny", "model.vision.num_layers=1", "seed=3")
WORDS = ("model.vision.num_layers=1", "steps=3", "batch=8", "seed=3", "platform=cpu")


@pytest.fixture
def run(digits):
    return compose_run([*SMALL, f"data.path={digits}"])


def test_scenes_are_the_pixels_that_a_run_is_shown_and_the_names_of_the_train_split(run, digits):
    from nemo_pre.data.images import image_tensor
    from nemo_pre.diagnostics.samples import read_data

    manifest = read_manifest(digits)
    numbers = names_of(manifest, None)
    assert list(numbers) == [str(digit) for digit in range(10)] and list(numbers.values()) == list(range(1, 11))
    scenes = read_scenes(run, manifest, "val", numbers, None)
    first = next(iter(read_data(digits, 0, 1).test_samples()))
    vision = run.model.vision
    shown = image_tensor(first.picture, vision.image_size, vision.image_mean, vision.image_std, "here")
    ours = Teacher(run, 10).normalised(scenes.pixels[:1])[0]
    torch.testing.assert_close(ours, shown, rtol=0, atol=1e-6)
    assert scenes.classes.shape == (len(scenes), 36) and scenes.boxes.shape == (len(scenes), 36, 4)
    assert (scenes.boxes[scenes.classes == NO_OBJECT] == 0).all()
    assert (scenes.boxes[scenes.classes > NO_OBJECT][:, 2:] > scenes.boxes[scenes.classes > NO_OBJECT][:, :2]).all()


def test_the_loss_is_of_patches_with_a_label_and_of_boxes_with_an_object(run):
    teacher = Teacher(run, 10).eval()
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    classes, boxes = torch.full((2, 36), NOTHING), torch.rand(2, 36, 4)
    classes[0, :4] = torch.tensor([0, 1, 2, NOTHING])
    scores, found = teacher(pixels)
    named = torch.nn.functional.cross_entropy(scores[0, :3], classes[0, :3])
    off = (found[0, 1:3] - boxes[0, 1:3]).abs()
    smooth = torch.where(off < 0.05, off.square() / 0.1, off - 0.025).mean()
    torch.testing.assert_close(teacher.loss(pixels, classes, boxes), named + 2 * smooth)


def test_accuracy_counts_patches_with_an_object_and_empty_ones_apart(run, monkeypatch):
    teacher = Teacher(run, 10)
    classes = torch.tensor([[0, 0, 1, 2], [NOTHING, 3, 3, 0]])
    said = torch.tensor([[0, 1, 1, 2], [5, 3, 0, 0]])
    answers = torch.nn.functional.one_hot(said, 11).float(), torch.full((2, 4, 4), 0.5)
    monkeypatch.setattr(teacher, "forward", lambda pixels: answers)
    found = measure(teacher, Scenes(torch.zeros(2, 3, 8, 8), classes, torch.full((2, 4, 4), 0.4)), "cpu")
    assert (found.objects, found.empty, found.patches) == (3 / 4, 2 / 3, 4)
    assert found.box == pytest.approx(0.1)


def test_the_same_command_gives_the_same_tower_and_says_where_it_is_from(digits, tmp_path, capsys):
    for name in ("one", "two"):
        assert main(["teach", str(tmp_path / name), f"data={digits}", *WORDS]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"vision_from={tmp_path / 'two'}")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    facts = read_provenance(tmp_path / "one")
    assert facts["seed"] == 3 and facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["command"].startswith(f"nemo-pre teach one data={digits} experiment=digits_tiny steps=3")
    assert facts["command"].endswith("model.vision.num_layers=1")
    assert set(facts["accuracy"]) == {"val"} and facts["accuracy"]["val"]["patches"] > 0
    card = (tmp_path / "one" / "README.md").read_text()
    assert facts["command"] in card and facts["commit"] in card
    assert main(["teach", str(tmp_path / "one"), f"data={digits}", *WORDS]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word, sentence",
    [
        ("model.vision.family=qwen25_vl", "qwen25_vl cannot be taught"),
        ("data.image_resize=pad", "set data.image_resize=whole"),
        ("name=colour", "has no name=colour of an object"),
        ("learning_rate=0", "learning_rate=0.0 must be more than 0"),
        ("data=nowhere", "data=nowhere has no manifest.json"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_anything_is_made(word, sentence, digits, tmp_path, capsys):
    words = {each.partition("=")[0]: each for each in (f"data={digits}", *WORDS, word)}
    assert main(["teach", str(tmp_path / "out"), *words.values()]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_a_name_that_only_another_split_has_teaches_nothing(run, digits):
    manifest = read_manifest(digits)
    few = {"3": 1}
    scenes = read_scenes(run, replace(manifest), "val", few, None)
    assert {*scenes.classes.unique().tolist()} == {NOTHING, NO_OBJECT, 1}


def test_the_metadata_are_read_by_transformers_too(digits, tmp_path):
    from transformers import CLIPVisionModel

    assert main(["teach", str(tmp_path / "out"), f"data={digits}", *WORDS]) == 0
    tower, report = CLIPVisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert tower.config.num_hidden_layers == 1
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"] == {
        "height": 48,
        "width": 48,
    }
