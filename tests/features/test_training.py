"""Runs with and without features are the same run: losses, weights, checkpoints, resumption, validation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nemo_pre.checks.run import check_run
from nemo_pre.cli import main
from nemo_pre.config.compose import compose_run
from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader
from nemo_pre.run_files.saved_config import saved_model
from tests.features.made import run_words
from tests.ranks import RankError
from tests.training.job import train
from tests.training.test_laver_training import lines

TERMS = ("lm/loss", "pre/loss", "laver/mim", "laver/gram", "laver/similarity", "grad_norm")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits, digits_features) -> dict[str, Path]:
    """The same four steps with images and with features, on one rank."""
    directory = tmp_path_factory.mktemp("runs")
    for name, word in (("images", "data.features=null"), ("features", f"data.features={digits_features}")):
        train(1, run_words(directory / name, digits, word))
    return {name: directory / name for name in ("images", "features")}


def weights(output: Path, step: int = 4) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(output / "checkpoints" / f"step={step}")
    return {key: reader.read(key) for key in reader.tensors() if key.startswith("module.")}


def test_every_loss_gradient_norm_and_answer_is_the_same(runs):
    with_images, with_features = lines(runs["images"]), lines(runs["features"])
    for step in (1, 2, 3, 4):
        for term in TERMS:
            assert with_features[step][term] == pytest.approx(with_images[step][term], rel=1e-6), (step, term)
    for term in ("val/lm_loss", "val/exact_match", "val/answers"):
        assert with_features[4][term] == pytest.approx(with_images[4][term], rel=1e-6), term


def test_a_checkpoint_holds_the_encoder_that_was_never_built_and_exports(runs):
    expected, found = weights(runs["images"]), weights(runs["features"])
    assert found.keys() == expected.keys()
    towers = [key for key in found if key.startswith("module.vision_model.")]
    assert len(towers) == 39 and all(torch.equal(found[key], expected[key]) for key in towers)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    checkpoint = runs["features"] / "checkpoints" / "step=4"
    assert CheckpointReader(checkpoint).check(saved_model(checkpoint))


def continued(former: Path, output: Path) -> Path:
    shutil.copytree(former / "checkpoints" / "step=2", output / "checkpoints" / "step=2")
    return output


@pytest.mark.parametrize(
    "former, then, layout, ranks",
    [("images", "features", "parallel=tp2_pp2_sp", 4), ("features", "images", "parallel=single", 1)],
)
def test_a_run_continues_with_or_without_features(
    former, then, layout, ranks, runs, digits, digits_features, tmp_path
):
    output = continued(runs[former], tmp_path / "run")
    features = digits_features if then == "features" else "null"
    words = run_words(output, digits, f"data.features={features}", layout, "trainer.async_checkpoint=true")
    check_run(compose_run(words))  # the encoder of the checkpoint is the features'
    train(ranks, words)
    expected, found = lines(runs["images"]), lines(output)
    assert min(found) == 3
    for step in (3, 4):
        for term in TERMS:
            assert found[step][term] == pytest.approx(expected[step][term], rel=5e-5, abs=2e-5), (step, term)
    towers = [{k: v for k, v in weights(each).items() if "vision_model" in k} for each in (output, runs["images"])]
    assert towers[0].keys() == towers[1].keys()
    assert all(torch.equal(towers[0][key], tensor) for key, tensor in towers[1].items())


def test_features_of_another_encoder_than_the_checkpoints_are_refused(runs, digits, tmp_path, capsys):
    words = run_words(tmp_path / "run", digits, f"data.features={tmp_path / 'f'}")
    assert main(["data", "features", *words, "seed=5"]) == 0
    given = [*words, f"init_from={runs['images'] / 'checkpoints'}", "dry_run=true"]
    assert main(["train", *given]) == 2
    said = capsys.readouterr().err
    assert "another vision tower (random weights of seed 5)" in said and "step=4)" in said


def test_an_external_anchor_sees_the_images_beside_the_features_of_packed_rows(
    digits, digits_features, external_model, tmp_path
):
    copy = shutil.copytree(digits, tmp_path / "digits")  # lengths are written beside it
    packed = ["objective.pre.anchor=external", f"objective.pre.external_path={external_model}", "data.packing=true"]
    more = [
        *packed,
        "data.sequence_length=192",
        "trainer.max_steps=2",
        "trainer.val_samples=0",
        "trainer.global_batch_size=4",
    ]
    assert main(["data", "lengths", *run_words(tmp_path, copy, *more)]) == 0
    found = []
    for name, word in (("images", "data.features=null"), ("features", f"data.features={digits_features}")):
        train(1, run_words(tmp_path / name, copy, *more, word), saves=False)
        found.append([[line[term] for term in TERMS] for _, line in sorted(lines(tmp_path / name).items())])
    assert len(found[0]) == 2
    for one, other in zip(*found, strict=True):
        assert other == pytest.approx(one, rel=1e-6)


def test_a_bf16_run_reads_what_it_would_compute_itself(digits, tmp_path):
    """bfloat16 features are computed in bfloat16, not rounded from float32."""
    more = ["precision=bf16", "trainer.max_steps=2", "trainer.val_samples=0"]
    features = f"data.features={tmp_path / 'f'}"
    assert main(["data", "features", *run_words(tmp_path, digits, *more, features)]) == 0
    for name, word in (("images", "data.features=null"), ("features", features)):
        train(1, run_words(tmp_path / name, digits, *more, word), saves=False)
    one, other = lines(tmp_path / "images"), lines(tmp_path / "features")
    for step in (1, 2):
        assert other[step]["lm/loss"] == pytest.approx(one[step]["lm/loss"], rel=1e-5), step
        assert other[step]["pre/loss"] == pytest.approx(one[step]["pre/loss"], abs=1e-5), step


def test_a_rank_without_the_features_file_says_which(digits, digits_features, tmp_path):
    """As on a node of its own, where the launcher has not looked."""
    copy = Path(shutil.copytree(digits_features, tmp_path / "features"))
    next(copy.glob("train*")).unlink()
    with pytest.raises(RankError, match=r"train-0000\d.*safetensors is missing"):
        train(1, run_words(tmp_path / "run", digits, f"data.features={copy}"))
