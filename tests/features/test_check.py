"""Features that are not a run's are refused by ``nemo-pre train`` in one sentence, before anything is built."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_pre.checks.run import check_run
from nemo_pre.cli import main
from nemo_pre.config.compose import compose_run
from nemo_pre.data.decoding import DECODING
from nemo_pre.data.features import FeaturesManifest, read_features
from nemo_pre.features.check import PICTURES, check_described, described
from tests.data.prepared_sets import image_bytes, sample, write_set
from tests.features.made import run_words


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What ``nemo-pre train`` says, which must be one sentence and nothing else."""
    assert main(["train", *words, "dry_run=true"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("nemo-pre: ") and "\n" not in said
    return said


def test_the_features_of_the_run_are_accepted_and_rounded_ones_warned_of(digits, digits_features, tmp_path):
    report = check_run(compose_run(run_words(tmp_path / "run", digits, f"data.features={digits_features}")))
    assert not [warning for warning in report.warnings if "features" in warning]
    rounded = run_words(tmp_path / "run", digits, f"data.features={tmp_path / 'rounded'}")
    assert main(["data", "features", *rounded]) == 0
    (warning,) = (w for w in check_run(compose_run(rounded)).warnings if "features" in w)
    assert "is rounded to bfloat16" in warning
    assert not [w for w in check_run(compose_run([*rounded, "precision=bf16"])).warnings if "rounded" in w]


@pytest.mark.parametrize(
    "word, sentence",
    [
        ("optim.freeze_vision=false", "data.features is what a frozen encoder gives: set optim.freeze_vision=true"),
        ("trainer.log_diagnostics_every=2", "trainer.log_diagnostics_every looks at pictures through the encoder"),
        ("seed=7", "computed with another vision tower (random weights of seed 1234) than this run starts with"),
        ("model.vision.feature_layer=-2", "was computed with model.vision.feature_layer=-1 and this run has -2"),
        ("model.vision.image_mean=[0.5,0.5,0.5]", "was computed with model.vision.image_mean=[0.166, 0.166, 0.166]"),
        ("data.image_resize=pad", "was computed with data.image_resize=whole and this run has pad"),
    ],
)
def test_another_encoder_or_preprocessing_is_refused(word, sentence, digits, digits_features, tmp_path, capsys):
    words = run_words(tmp_path / "run", digits, f"data.features={digits_features}", word)
    assert sentence in refused(capsys, *words)


def test_features_of_pictures_that_were_decoded_in_another_way_are_refused(monkeypatch):
    config = compose_run(["experiment=digits_tiny", "data.path=x"])
    now = FeaturesManifest(Path("f"), "data.features", "float32", 1, 1, described(config), {}, {})
    check_described(described(config), now)
    before = {name: value for name, value in described(config).items() if name != PICTURES}
    with pytest.raises(ValueError, match="data.features=f is of pictures decoded in way 1, and this version"):
        check_described(described(config), replace(now, described=before))
    monkeypatch.setattr("nemo_pre.features.check.DECODING", DECODING + 1)
    with pytest.raises(ValueError, match=f"decoded in way {DECODING}, and this version decodes them in way"):
        check_described(described(config), now)


def test_other_shards_and_cut_or_missing_files_are_refused(digits, digits_features, tmp_path, capsys):
    other = write_set(tmp_path / "other", [sample(f"s{n}", [image_bytes(n)]) for n in range(8)])
    blend = f"data.blend=[{{path: {digits}, weight: 1}}, {{path: {other}, weight: 1}}]"
    given = run_words(tmp_path / "run", digits, f"data.features={digits_features}")
    assert f"has no features of {other / 'train-00000.tar'}" in refused(capsys, *given, blend)

    copy = Path(shutil.copytree(digits_features, tmp_path / "features"))
    given = run_words(tmp_path / "run", digits, f"data.features={copy}")
    first = next(iter(read_features(copy).files.values())).path
    with first.open("r+b") as file:
        file.truncate(first.stat().st_size - 1)
    assert f"{first} has " in (said := refused(capsys, *given)) and "it ends at image" in said
    first.unlink()
    assert f"{first} is missing" in refused(capsys, *given)
    shutil.copy(digits_features / first.name, first)
    (copy / "tower.safetensors").write_bytes(b"")
    assert "tower.safetensors has 0 bytes where features.json says" in refused(capsys, *given)
    (copy / "features.json").unlink()
    assert f"data.features={copy} has no features.json" in refused(capsys, *given)


def test_one_directory_holds_the_features_of_a_blend(digits, digits_features, tmp_path):
    """What is there already is not computed again."""
    copy = Path(shutil.copytree(digits_features, tmp_path / "features"))
    before = {path: path.stat().st_mtime_ns for path in copy.glob("train*")}
    other = write_set(tmp_path / "other", [sample(f"s{n}", [image_bytes(n)]) for n in range(8)])
    blend = f"data.blend=[{{path: {digits}, weight: 1}}, {{path: {other}, weight: 1}}]"
    words = run_words(tmp_path / "run", digits, f"data.features={copy}", blend)
    assert main(["data", "features", *words, "dtype=float32"]) == 0
    assert len(list(copy.glob("train*"))) == len(before) + 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    check_run(compose_run(words))


def test_a_shard_under_another_name_is_not_computed_again(digits, digits_features, tmp_path):
    renamed = Path(shutil.copytree(digits, tmp_path / "renamed"))
    manifest = renamed / "manifest.json"
    manifest.write_text(manifest.read_text().replace("train-", "other-"))
    for path in renamed.glob("train-*"):
        path.rename(path.with_name(path.name.replace("train-", "other-")))
    copy = Path(shutil.copytree(digits_features, tmp_path / "features"))
    words = run_words(tmp_path / "run", renamed, f"data.features={copy}")
    assert main(["data", "features", *words, "dtype=float32"]) == 0
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in digits_features.iterdir())
    check_run(compose_run(words))
