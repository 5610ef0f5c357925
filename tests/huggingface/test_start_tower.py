"""``vision_from``: a run's encoder starts as a tower that is its own, and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_pre.checks.run import check_run
from nemo_pre.config.compose import compose_run
from nemo_pre.huggingface.start_tower import TOWERS, check_vision_from, shipped_towers, tower_directory
from nemo_pre.neva.vision import VisionTowerConfig
from nemo_pre.teaching.teach import CARD, WEIGHTS, read_provenance

TAUGHT = ("experiment=digits_taught", "platform=cpu", "parallel=single")


@pytest.fixture
def copied(tmp_path) -> Path:
    """A directory of the shipped tower that a test may spoil."""
    return Path(shutil.copytree(TOWERS / "digits", tmp_path / "tower"))


def spoil(directory: Path, name: str, **values: object) -> None:
    file = directory / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("name", shipped_towers())
def test_a_shipped_tower_is_small_and_says_where_it_is_from(name):
    directory = TOWERS / name
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 2_000_000
    facts = read_provenance(directory)
    assert facts["command"].startswith("nemo-pre teach ") and len(facts["commit"].rstrip("+")) >= 7
    assert {"python", "torch", "transformers"} <= set(facts["versions"])
    assert facts["data"]["parameters"]["seed"] == 0 and facts["data"]["fingerprint"]
    for found in facts["accuracy"].values():
        assert found["patches"] > 0 and 0 < found["objects"] <= 1
    card = (directory / CARD).read_text()
    assert facts["command"] in card and f"seed {facts['seed']}" in card and facts["commit"] in card


@pytest.mark.parametrize("experiment", ["digits_taught", "digits_taught_pre"])
def test_the_shipped_tower_is_the_one_that_the_demo_expects(experiment):
    """The study and every other digits recipe start from random weights, as they did."""
    run = compose_run([f"experiment={experiment}"])
    check_vision_from(run)
    untaught = compose_run([f"experiment={experiment.replace('taught', 'tiny')}"])
    assert untaught.vision_from is None and asdict(untaught.model) == asdict(run.model)


def test_the_encoder_is_built_with_the_tower_s_weights_whatever_the_seed():
    run = compose_run(TAUGHT)
    stored = load_file(TOWERS / "digits" / WEIGHTS)
    for seed in (1, 2):
        tower = VisionTowerConfig(run.model.vision, seed, start=str(tower_directory("digits"))).configure_model()
        assert dict.fromkeys(stored, True) == {
            name: torch.equal(tensor, stored[name]) for name, tensor in tower.state_dict().items()
        }


def test_a_tower_within_a_whole_model_will_do(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    run = compose_run([*TAUGHT, f"vision_from={tmp_path / 'clip'}"])
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = json.loads((TOWERS / "digits" / "config.json").read_text())
    whole = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 64}, vision_config=vision))
    whole.save_pretrained(tmp_path / "clip")
    shutil.copy(TOWERS / "digits" / "preprocessor_config.json", tmp_path / "clip")
    check_vision_from(run)
    tower = VisionTowerConfig(run.model.vision, 0, start=str(tmp_path / "clip")).configure_model()
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("model.vision.num_layers=3", "model.vision.num_layers=3 but the tower of vision_from=digits has 4"),
        ("model.vision.hidden_size=64", "model.vision.hidden_size=64 but the tower of vision_from=digits has 96"),
        ("model.vision.patch_size=16", "set model.vision.patch_size=8, or vision_from=null"),
        ("model.vision.image_size=96 data.sequence_length=176", "model.vision.image_size=96 but"),
        (
            "model.vision.family=siglip model.vision.drop_class_token=false",
            "model.vision.family=siglip but the tower of vision_from=digits has clip",
        ),
        ("model.vision.image_mean=[0.5,0.5,0.5]", "set model.vision.image_mean=[0.166,0.166,0.166]"),
        ("data.image_filter=bilinear", "set data.image_filter=bicubic"),
        ("vision_from=nowhere", "vision_from=nowhere is not a directory: .* one that comes along: digits"),
        ("vision_from=./digits", "vision_from=./digits is not a directory"),
    ],
)
def test_what_is_another_tower_is_refused_by_name_before_anything_starts(words, sentence, digits, tmp_path):
    run = compose_run([*TAUGHT, f"data.path={digits}", f"output_dir={tmp_path / 'run'}", *words.split()])
    with pytest.raises(ValueError, match=sentence.replace("[", r"\[").replace("/", "[/]")):
        check_run(run)


def test_a_family_that_is_built_of_nothing_but_a_run_is_refused(digits, tmp_path):
    of_patches = ["model.vision.family=patch_mlp", "model.vision.num_layers=0", "model.vision.drop_class_token=false"]
    with pytest.raises(ValueError, match="vision_from=digits starts no patch_mlp: set it to null"):
        check_run(compose_run([*TAUGHT, f"data.path={digits}", f"output_dir={tmp_path / 'run'}", *of_patches]))


def test_a_tower_that_is_not_whole_is_refused_by_the_tensor(copied):
    run = compose_run([*TAUGHT, f"vision_from={copied}"])
    check_vision_from(run)
    tensors = load_file(copied / WEIGHTS)
    lost = "vision_model.encoder.layers.3.mlp.fc2.bias"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, copied / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=f"has no tensor .*{lost}"):
        check_vision_from(run)
    with pytest.raises(ValueError, match=f"no weights that fit {lost}"):
        VisionTowerConfig(run.model.vision, 0, start=str(copied)).configure_model()
    (copied / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="tower"):
        check_vision_from(run)


def test_a_tower_of_other_pixels_is_refused(copied):
    run = compose_run([*TAUGHT, f"vision_from={copied}"])
    spoil(copied, "preprocessor_config.json", image_std=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"set model.vision.image_std=\[0.5,0.5,0.5\]"):
        check_vision_from(run)
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        check_vision_from(run)


def test_init_from_brings_the_encoder_and_the_run_says_so(digits, tmp_path):
    from nemo_pre.checks.run import check_options

    run = compose_run([*TAUGHT, f"data.path={digits}", f"init_from={tmp_path}"])
    assert any("vision_from=digits has no effect" in warning for warning in check_options(run))
    alone = compose_run([*TAUGHT, f"data.path={digits}", f"output_dir={tmp_path / 'run'}"])
    report = check_run(alone)
    assert "encoder     weights of vision_from=digits, frozen" in report.summary()
    assert not any("vision_from" in warning for warning in report.warnings)
