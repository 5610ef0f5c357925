"""Features of an objective's frozen model on disk: they are what the run would compute, and no other's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo_pre.checks.run import check_run
from nemo_pre.cli import main
from nemo_pre.config.compose import compose_run
from nemo_pre.data.collate import Collate
from nemo_pre.data.dataset import ConversationDataset
from nemo_pre.data.errors import SampleError
from nemo_pre.data.features import read_features
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.packed import PackedCollate
from nemo_pre.data.preprocessing import looks_at_pixels
from nemo_pre.features.writer import ShardFeatures
from nemo_pre.objectives.registry import wanted_targets
from nemo_pre.terms.frozen_vision import FrozenVision
from tests.data.prepared_sets import image_bytes, preprocessing, sample, write_set
from tests.features.made import run_config, run_words, small_set, words
from tests.features.test_check import refused
from tests.features.test_files import contents
from tests.training.job import train
from tests.training.test_laver_training import lines

TERMS = ("lm/loss", "pre/loss", "laver/mim", "laver/gram", "grad_norm")
OPTION = "objective.pre.external_features"


def anchored(model: Path, *more: str) -> list[str]:
    return ["objective.pre.anchor=external", f"objective.pre.external_path={model}", *more]


def with_pre(model: Path, features: Path, *more: str) -> list[str]:
    return ["objective=pre", *anchored(model), f"{OPTION}={features}", *more]


def make(data: Path, model: Path, features: Path, *more: str) -> int:
    """``nemo-pre data features of=objective.pre``; its exit code."""
    return main(["data", "features", "of=objective.pre", *words(data, None, *with_pre(model, features), *more)])


@pytest.fixture(scope="module")
def made(tmp_path_factory, external_model) -> tuple[Path, Path]:
    """Data and float32 features of the external model; not to be changed."""
    directory = tmp_path_factory.mktemp("targets")
    data, features = small_set(directory / "data"), directory / "features"
    assert make(data, external_model, features, "dtype=float32") == 0
    return data, features


@pytest.fixture(scope="session")
def digits_targets(digits, external_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("digits-targets") / "features"
    given = run_words(out, digits, *anchored(external_model, f"{OPTION}={out}", "dtype=float32"))
    assert main(["data", "features", "of=objective.pre", *given]) == 0
    return out


def reading(data: Path, features: Path, on_error: str = "raise", **options: object) -> ConversationDataset:
    how = preprocessing(targets=(("pre", str(features), OPTION),), **options)
    return ConversationDataset(read_manifest(data), "train", how, on_error)


# --- the files ------------------------------------------------------------------------------------------------------


def test_every_image_has_the_features_that_the_first_stage_would_compute_of_it(made, external_model):
    data, features = made
    (target,) = wanted_targets(run_config(data, None, *with_pre(external_model, features))).values()
    model = FrozenVision(target, torch.device("cpu"), [0.166] * 3, [0.148] * 3)
    found = reading(data, features)
    plain = ConversationDataset(read_manifest(data), "train", preprocessing())
    assert [len(found[n].targets["pre"]) for n in range(6)] == [0, 1, 2, 0, 1, 2]
    for position in range(len(plain)):
        one, other = plain[position], found[position]
        assert (one.key, one.tokens, one.labels) == (other.key, other.tokens, other.labels)
        assert all(map(torch.equal, one.images, other.images))
        for image, stored in zip(one.images, other.targets["pre"], strict=True):
            pixels = (image - 0.166) / 0.148  # the tests' own preprocessing normalises nothing
            torch.testing.assert_close(stored, model(pixels, 4), rtol=0, atol=1e-6)


def test_training_shards_alone_are_computed_and_no_weights_are_kept(made):
    data, features = made
    manifest = read_features(features, OPTION)
    assert manifest.files.keys() == {shard.sha256 for shard in read_manifest(data).shards["train"]}
    assert (manifest.tokens, manifest.width, "bytes" in manifest.tower) == (4, 24, False)
    assert not (features / "tower.safetensors").exists()


def test_a_batch_has_the_features_of_its_images_in_their_order_and_a_packed_row_too(made):
    data, features = made
    found = reading(data, features)
    items = [found[n] for n in (2, 0, 1)]
    expected = torch.cat(found[2].targets["pre"] + found[1].targets["pre"])
    batch = Collate(text_tokens=300, padding_id=0)(items)
    assert batch["targets"]["pre"].shape == (3, 4, 24) and torch.equal(batch["targets"]["pre"], expected)
    assert len(batch["media"]) == 3
    packed = PackedCollate(text_tokens=900, padding_id=0)([items, [found[4]]])
    assert torch.equal(packed["targets"]["pre"], torch.cat([expected, *found[4].targets["pre"]]))
    assert Collate(text_tokens=300, padding_id=0)([found[0]])["targets"] == {}
    plain = ConversationDataset(read_manifest(data), "train", preprocessing())
    assert "targets" not in Collate(text_tokens=300, padding_id=0)([plain[2]])


def test_an_unreadable_image_is_passed_over_and_a_damaged_feature_is_a_bad_sample(tmp_path, external_model, capsys):
    samples = [sample(f"s{n}", [image_bytes(n)]) for n in range(20)]
    samples[3] = sample("s3", [b"\x89PNG\r\n but nothing of a picture"])
    data = write_set(tmp_path / "data", samples)
    assert make(data, external_model, tmp_path / "f", "dtype=float32") == 0
    assert "no features: sample s3 of" in capsys.readouterr().err
    plain = ConversationDataset(read_manifest(data), "train", preprocessing(), "skip")
    found = reading(data, tmp_path / "f", "skip")
    assert [found[n].key for n in range(20)] == [plain[n].key for n in range(20)]
    file = found.targets["pre"].files[0]
    content = bytearray(file.path.read_bytes())
    content[file.features_at + 2 * file.image_bytes + 5] ^= 1
    file.path.write_bytes(content)
    with pytest.raises(SampleError, match=r"sample s2 of .* damaged at byte"):
        reading(data, tmp_path / "f")[2]


def test_parts_make_the_whole_a_killed_computation_goes_on_and_a_dry_run_counts(
    made, external_model, tmp_path, capsys
):
    data, features = made
    total = sum(file.bytes for file in read_features(features, OPTION).files.values())
    assert make(data, external_model, tmp_path / "f", "dtype=float32", "dry_run=true") == 0
    assert not (tmp_path / "f").exists()
    assert f"3 shards, 19 images of 4 x 24 float32, {total / 1e6:,.1f} MB" in capsys.readouterr().err
    assert make(data, external_model, tmp_path / "f", "dtype=float32", "part=2/2") == 0
    (busy, *_) = (file for file in read_features(tmp_path / "f").files.values() if not file.is_whole)
    with ShardFeatures(busy, [0] * (busy.samples - 1) + [busy.images]) as started:
        started.add(torch.zeros(1, 4, 24))  # and is killed
    assert not busy.path.exists()
    assert make(data, external_model, tmp_path / "f", "dtype=float32") == 0
    assert contents(tmp_path / "f") == contents(features)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["of=objective.laver"], "of=objective.laver is no objective of this run that looks at a frozen vision model"),
        ([f"{OPTION}=null"], f"Name the directory that features are written to: {OPTION}=DIR"),
        (["objective.pre.external_path=null"], "objective.pre.external_path=DIR"),
        (["objective.pre.external_image_size=30"], "objective.pre.external_image_size=30 is no multiple"),
        (["data.max_tiles=4"], f"{OPTION} holds one tile an image, not data.max_tiles=4"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_sentence(more, sentence, made, external_model, tmp_path, capsys):
    assert make(made[0], external_model, tmp_path / "f", "trainer.val_samples=0", *more) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def other_weights(model: Path, copy: Path) -> Path:
    from transformers import Dinov2Model

    shutil.copytree(model, copy)
    changed = Dinov2Model.from_pretrained(model)
    changed.layernorm.bias.data[0] += 1e-3
    changed.save_pretrained(copy)
    return copy


def test_features_of_another_model_size_picture_or_data_are_refused(
    digits, digits_targets, external_model, tmp_path, capsys
):
    def given(model: Path | None = external_model, features: Path = digits_targets, *more: str) -> list[str]:
        path = f"objective.pre.external_path={'null' if model is None else model}"
        pre = ["objective.pre.anchor=external", path, f"{OPTION}={features}"]
        return run_words(tmp_path / "run", digits, *pre, *more)

    assert not [warning for warning in check_run(compose_run(given())).warnings if "features" in warning]
    assert not [warning for warning in check_run(compose_run(given(None))).warnings if "features" in warning]
    other = other_weights(external_model, tmp_path / "other")
    assert f"{OPTION}={digits_targets} was computed with other weights" in refused(capsys, *given(other))
    activation = Path(shutil.copytree(external_model, tmp_path / "activation"))
    config = json.loads((activation / "config.json").read_text())
    (activation / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert "computed with the sha256 of its configuration=" in refused(capsys, *given(activation))
    normalised = Path(shutil.copytree(external_model, tmp_path / "normalised"))
    (normalised / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    assert "its pixels' mean, standard deviation and scale=" in refused(capsys, *given(normalised))
    bare = Path(shutil.copytree(external_model, tmp_path / "bare"))
    (bare / "preprocessor_config.json").unlink()
    assert "without preprocessor_config.json" in refused(capsys, *given(bare))
    for model in (external_model, None):
        size = refused(capsys, *given(model, digits_targets, "objective.pre.external_image_size=56"))
        assert "objective.pre.external_image_size=28 and this run has 56" in size
    assert "data.image_resize=whole and this run has pad" in refused(
        capsys, *given(None, digits_targets, "data.image_resize=pad")
    )
    copy = Path(shutil.copytree(digits_targets, tmp_path / "copy"))
    first = next(iter(read_features(copy).files.values())).path
    first.unlink()
    assert f"{first} is missing" in refused(capsys, *given(None, copy))
    (copy / "features.json").unlink()
    assert f"{OPTION}={copy} has no features.json" in refused(capsys, *given(None, copy))


def test_the_encoders_directory_and_the_targets_are_not_mixed_up(digits, digits_features, external_model, capsys):
    given = run_words(digits / "run", digits, *anchored(external_model, f"{OPTION}={digits_features}"))
    assert f"{OPTION}={digits_features} was computed with" in refused(capsys, *given)
    assert main(["data", "features", "of=objective.pre", *given, "dtype=float32"]) == 2
    assert f"{OPTION}={digits_features} holds features with another" in capsys.readouterr().err


# --- the run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(digits, external_model, tmp_path_factory) -> Path:
    """Four steps whose external model runs in them."""
    output = tmp_path_factory.mktemp("computed")
    train(1, run_words(output, digits, *anchored(external_model)))
    return output


def test_losses_and_gradient_norms_are_those_of_the_computed_features(
    computed, digits, digits_targets, digits_features, external_model, tmp_path
):
    """Also without the model and without any picture: the encoder's features are read too."""
    expected = lines(computed)
    both = [f"data.features={digits_features}", f"{OPTION}={digits_targets}", "objective.pre.external_path=null"]
    given = run_words(tmp_path / "run", digits, "objective.pre.anchor=external", *both)
    assert not looks_at_pixels(compose_run(given))
    check_run(compose_run(given))
    train(1, given)
    found = lines(tmp_path / "run")
    for step in (1, 2, 3, 4):
        for term in TERMS:
            assert found[step][term] == pytest.approx(expected[step][term], rel=1e-6), (step, term)


def test_a_bf16_run_compares_with_the_same_features_read_or_computed(digits, digits_targets, external_model, tmp_path):
    """The external model computes in float32, of pixels that the encoder's bfloat16 has not rounded."""
    more = ["precision=bf16", "trainer.max_steps=2", "trainer.val_samples=0"]
    for name, word in (("live", f"{OPTION}=null"), ("read", f"{OPTION}={digits_targets}")):
        given = run_words(tmp_path / name, digits, *anchored(external_model, word, *more))
        train(1, given)
    one, other = lines(tmp_path / "live"), lines(tmp_path / "read")
    for step in (1, 2):
        assert other[step]["pre/loss"] == pytest.approx(one[step]["pre/loss"], rel=1e-6), step


def test_a_run_continues_with_features_in_another_layout(computed, digits, digits_targets, external_model, tmp_path):
    """Its first stage reads the features; the layer's stage gets them over the pipeline."""
    output = tmp_path / "run"
    shutil.copytree(computed / "checkpoints" / "step=2", output / "checkpoints" / "step=2")
    given = run_words(output, digits, *anchored(external_model, f"{OPTION}={digits_targets}"), "parallel=tp2_pp2_sp")
    check_run(compose_run(given))
    train(4, given)
    expected, found = lines(computed), lines(output)
    assert min(found) == 3
    for step in (3, 4):
        for term in TERMS:
            assert found[step][term] == pytest.approx(expected[step][term], rel=5e-5, abs=2e-5), (step, term)
