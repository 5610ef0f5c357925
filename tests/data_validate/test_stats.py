"""The counts are those of the samples, the quantiles exact, and the advice follows from the loader's nature."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.stats import stats
from data_prep.stats.count import _source
from data_prep.stats.summary import quantiles
from tests.data_validate.small import edit, record, samples, seal, write


def test_every_sample_is_counted_as_it_was_written(tmp_path: Path) -> None:
    result = stats(str(write(tmp_path)), processes=1)
    for split in ("train", "val"):
        found = result["splits"][split]
        assert (found["samples"], found["unreadable"], found["shards"]) == (4, 0, 1)
        assert found["sources"] == {"small": 2, "coco": 1, "text only": 1}
        assert found["images_per_sample"] == {"0": 1, "1": 2, "2": 1}
        assert found["most_common_sizes"] == [[24, 24, 4]]
        assert found["tokens"] is None and found["longer_than_sequence_length"] is None
        written = [json.loads(members["json"])["conversations"] for _, members in samples(split)]
        characters = [sum(len(turn["value"].replace("<image>", "")) for turn in turns) for turns in written]
        assert found["characters"]["max"] == max(characters)
        assert found["characters"]["mean"] == pytest.approx(np.mean(characters), abs=1e-3)


def test_tokens_are_those_of_the_tokenizer_that_lies_with_the_data(digits: Path) -> None:
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.shards import ShardedSamples
    from nemo_pre.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(digits / "tokenizer")
    val = ShardedSamples(read_manifest(digits).shards["val"])
    lengths, longer = [], 0
    for position in range(len(val)):
        sample = val.read(position)
        texts = [turn["value"].replace("<image>", "") for turn in sample.record["conversations"]]
        lengths.append(sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts))
        longer += lengths[-1] + 64 * len(sample.images) > 78
    found = stats(str(digits), visual_tokens=64, sequence_length=78, processes=1)["splits"]["val"]
    assert found["tokens"]["median"] == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert found["tokens"]["mean"] == pytest.approx(np.mean(lengths), abs=1e-3)
    assert found["longer_than_sequence_length"] == longer / len(val) > 0


def test_two_processes_count_what_one_counts(digits: Path) -> None:
    assert stats(str(digits), processes=2) == stats(str(digits), processes=1)


def test_quantiles_are_exact() -> None:
    values = np.random.default_rng(0).geometric(0.01, 1000)
    found = quantiles(Counter(values.tolist()))
    assert found is not None
    for name, share in {"min": 0, "p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1}.items():
        assert found[name] == np.quantile(values, share, method="inverted_cdf"), name


def test_an_unreadable_sample_is_counted_as_that_and_nothing_else(tmp_path: Path) -> None:
    bad = ("bad", {"jpg": b"no image", "json": record(image="bad.jpg")})
    write(tmp_path, {"train": [*samples("train"), bad], "val": samples("val")})
    train = stats(str(tmp_path), processes=1)["splits"]["train"]
    assert (train["samples"], train["unreadable"]) == (5, 1)
    assert sum(train["sources"].values()) == sum(train["images_per_sample"].values()) == 4


def test_the_advice_names_the_loader_processes_and_says_that_this_loader_needs_none(tmp_path: Path) -> None:
    data = str(write(tmp_path))
    few = stats(data, dp=8, workers=4, processes=1)["shards"]
    assert few["needed_for_streaming"] == few["recommended_for_streaming"] == 32
    assert (few["needed_by_nemo_pre"], few["enough_for_streaming"]) == (1, False)
    assert "any number of shards serves dp=8" in few["advice"] and "at least 32" in few["advice"]
    assert stats(data, dp=1, workers=1, processes=1)["shards"]["enough_for_streaming"]


def test_large_data_is_to_have_shards_of_a_gigabyte_in_a_multiple_of_the_readers(tmp_path: Path) -> None:
    edit(write(tmp_path) / "manifest.json", lambda m: m.replace(b'"bytes": ', b'"bytes": 70000', 1))
    size = json.loads((tmp_path / "manifest.json").read_text())["splits"]["train"]["shards"][0]["bytes"]
    shards = stats(str(tmp_path), dp=3, workers=1, processes=1)["shards"]["recommended_for_streaming"]
    assert shards % 3 == 0 and size / shards <= 10**9 < size / (shards - 3)


def test_the_files_are_written_where_they_are_asked_for_and_else_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data")
    before = sorted(data.iterdir())
    result = stats(str(data), processes=1, out=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "stats.json").read_text()) == result
    with Image.open(tmp_path / "out" / "stats.png") as plot:
        assert plot.width > 1000
    assert sorted(data.iterdir()) == before
    assert "images per sample: 1 with 0, 2 with 1, 1 with 2" in capsys.readouterr().out


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path)
    with pytest.raises(ValueError, match="dp=0"):
        stats(str(data), dp=0)
    with pytest.raises(ValueError, match="tokenizer"):
        stats(str(data), tokenizer=str(tmp_path))
    edit(data / "train-00000.index.json", lambda _: b"[")
    seal(data)
    with pytest.raises(ValueError, match="train-00000.index.json is not JSON"):
        stats(str(data), processes=1)


@pytest.mark.parametrize(
    ("stated", "image", "source"),
    [
        ("mix:llava_v1_5_mix665k.json[7]", "coco/train2017/1.jpg", "mix/coco"),
        ("mix:llava_v1_5_mix665k.json[8]", None, "mix/text only"),
        ("pretrain:blip.json[9]", "1.jpg", "pretrain"),
        ("fine:ai2d/train-00000-of-00003.parquet[10]", "10.png", "fine/ai2d"),
        ("laion", "a/1.jpg", "laion"),
        (None, "gqa/1.jpg", "gqa"),
        (None, "1.jpg", "data"),
    ],
)
def test_samples_are_counted_by_the_set_and_folder_they_come_from(
    stated: str | None, image: str | None, source: str
) -> None:
    assert _source({"source": stated, "image": image}, {}, "data") == source
