"""The study's encoder: what it is taught, that it learns, and that it is made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_pre.config.compose import compose_run
from nemo_pre.config.run import RunConfig
from nemo_pre.study.encoder import VISION, _pictures, prepare_encoder, prepare_start, start_directory

SMALL = ("experiment=digits_tiny", "model.vision.num_layers=1", "model.language.num_layers=2")


@pytest.fixture
def run(digits) -> RunConfig:
    return compose_run([*SMALL, f"data.path={digits}"])


def test_a_patch_is_named_by_the_digit_that_the_scene_says_is_there(run, digits):
    from nemo_pre.diagnostics.samples import read_data

    _, (pixels, classes) = _pictures(run, str(digits))
    data = read_data(digits, 0, 1 << 62)
    assert pixels.shape == (len(data.test), 3, 48, 48) and classes.shape == (len(data.test), 36)
    for sample, found in zip(data.test_samples(), classes.reshape(-1, 6, 6), strict=True):
        assert sample.mask is not None
        mask = np.array(sample.mask)
        for row, column in np.ndindex(6, 6):
            patch = mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            sizes = np.bincount(patch[patch > 0], minlength=11)
            expected = sizes.argmax() if sizes.max() >= 16 else 0  # a quarter of 64 pixels
            assert found[row, column] == expected


def test_the_encoder_learns_is_made_once_and_is_what_runs_start_from(run, digits, tmp_path, capsys):
    from transformers import CLIPVisionModel

    found = prepare_encoder(run, str(digits), tmp_path, 200, "cpu")
    assert found["accuracy"] > 0.3  # of ten digits: one name for all would be right for 0.1
    tower = CLIPVisionModel.from_pretrained(tmp_path / "encoder" / VISION)
    assert "step 200/200" in capsys.readouterr().out
    assert prepare_encoder(run, str(digits), tmp_path, 200, "cpu") == found
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="made with other options"):
        prepare_encoder(run, str(digits), tmp_path, 201, "cpu")

    for seed in (1, 2):
        prepare_start(run, tmp_path, seed, 0, "cpu")
    from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader

    one, two = (CheckpointReader(start_directory(tmp_path, seed)) for seed in (1, 2))
    name = "vision_model.embeddings.patch_embedding.weight"
    stored = next(key for key in one.tensors() if key.endswith(name))
    for reader in (one, two):
        torch.testing.assert_close(reader.read(stored), tower.state_dict()[name], rtol=0, atol=0)
    projector = next(key for key in one.tensors() if "projection" in key and key.endswith("weight"))
    assert not torch.equal(one.read(projector), two.read(projector))


@pytest.mark.parametrize("changed", [{"num_layers": 0}, {"family": "qwen25_vl"}])
def test_an_encoder_has_layers_and_a_fixed_resolution(run, changed, digits, tmp_path: Path):
    for name, value in changed.items():
        setattr(run.model.vision, name, value)
    with pytest.raises(ValueError, match="give encoder_steps=0"):
        prepare_encoder(run, str(digits), tmp_path, 1, "cpu")
