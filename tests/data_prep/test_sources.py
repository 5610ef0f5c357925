"""Each dataset's layout on disk becomes samples with the images, texts and origins it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from data_prep.prepare import prepare
from nemo_pre.checks.data import check_data
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.shards import ShardedSamples
from tests.data_prep import layouts
from tests.data_prep.layouts import picture, records, stored


def _prepare(source: Path, out: Path, **options):  # type: ignore[no-untyped-def]
    return prepare(str(source), str(out), **{"val_samples": 2, "workers": 1, **options})


def test_llava_pretrain_keeps_every_caption_and_the_bytes_of_every_image(tmp_path):
    manifest = _prepare(layouts.llava_pretrain(tmp_path / "LLaVA-Pretrain"), tmp_path / "out")
    samples = {**stored(tmp_path / "out"), **stored(tmp_path / "out", "val")}
    numbers = set()
    for members in samples.values():
        record = json.loads(members["json"])
        number = int(record["id"])
        assert members["jpg"] == picture(number)
        assert record["image"] == f"{number % 3:05d}/{number:09d}.jpg"
        assert record["source"] == f"LLaVA-Pretrain:blip_laion_cc_sbu_558k.json[{number}]"
        assert record["conversations"][1]["value"] == f"a picture, number {number} – naïve 日本"
        numbers.add(number)
    assert numbers == set(range(60)) and manifest["splits"]["val"]["samples"] == 2
    assert check_data(tmp_path / "out").num_samples("train") == 58


def test_llava_instruct_mixes_images_and_text_only_samples_for_the_reader(tmp_path):
    _prepare(layouts.llava_instruct(tmp_path / "data"), tmp_path / "out")
    samples = ShardedSamples(read_manifest(tmp_path / "out").shards["train"])
    raw = [samples.read(position) for position in range(len(samples))]
    assert len(raw) == 18
    for sample in raw:
        number = int(sample.record["id"])
        assert sample.image == (picture(1000 + number) if number % 4 else None)
        assert len(sample.record["conversations"]) == 4


def test_jsonl_with_lists_of_images_becomes_numbered_members(tmp_path):
    for number, format in enumerate(("JPEG", "PNG", "WEBP")):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number, format))  # the name says nothing of the format
    lines = [
        {"image": ["0.jpg", "1.jpg", "2.jpg"], "conversations": layouts.turns("<image><image>\n<image>?", "three")},
        {"image": ["2.jpg"], "conversations": layouts.turns("<image>?", "one")},
    ]
    _prepare(layouts.llava_jsonl(tmp_path / "mix.jsonl", lines), tmp_path / "out", val_samples=0, shuffle=False)
    several, one = stored(tmp_path / "out").values()
    assert list(several) == ["json", "0.jpg", "1.png", "2.webp"] and list(one) == ["json", "webp"]
    assert several["1.png"] == picture(1, "PNG")
    assert json.loads(several["json"])["images"] == ["0.jpg", "1.jpg", "2.jpg"]
    (entry, _) = json.loads((tmp_path / "out" / "train-00000.index.json").read_text())
    assert entry["image_sizes"] == [[40, 32]] * 3 and entry["text_chars"] == len("\n?three")


def test_llava_onevision_parquet_is_read_over_all_files_and_row_groups(tmp_path):
    _prepare(layouts.llava_onevision(tmp_path / "ov"), tmp_path / "out", val_samples=0)
    found = {}
    for members in stored(tmp_path / "out").values():
        record = json.loads(members["json"])
        found[record["id"]] = members
        subset, number = record["id"].rsplit("_", 1)
        assert record["source"] == f"ov:{subset}/train-00000-of-00001.parquet[{number}]"
        assert record["conversations"][1]["value"] == f"{subset} {number}"
    assert len(found) == 30
    assert found["mathqa_12"]["jpg"] == picture(2112) and found["mathqa_11"]["png"] == picture(2111, "PNG")
    assert list(found["mathqa_13"]) == ["json"]


def test_finevision_gets_one_tag_per_image_before_its_first_question(tmp_path):
    _prepare(layouts.finevision(tmp_path / "fv"), tmp_path / "out", val_samples=0, shuffle=False)
    samples = list(stored(tmp_path / "out").values())
    for number, members in enumerate(samples):
        record = json.loads(members["json"])
        assert record["conversations"][0]["value"] == "<image>\n" * (number % 3) + f"Question {number}?"
        assert record["conversations"][3]["value"] == "Yes."
    assert list(samples[2]) == ["json", "0.png", "1.png"] and samples[2]["1.png"] == picture(3005, "PNG")
    assert list(samples[0]) == ["json"]


def test_coco_stuff_stores_each_image_with_its_pixel_map(tmp_path):
    source = layouts.coco_stuff(tmp_path / "coco")
    _prepare(source, tmp_path / "out", val_samples=1)
    samples = stored(tmp_path / "out")
    assert len(samples) == 7
    for members in samples.values():
        record = json.loads(members["json"])
        mask = source / "stuffthingmaps_trainval2017" / f"{record['id']}.png"
        assert members["mask.png"] == mask.read_bytes()
        assert members["jpg"] == (source / f"{record['id']}.jpg").read_bytes()
        assert record["conversations"] == [{"from": "human", "value": "<image>"}]
    assert len(ShardedSamples(read_manifest(tmp_path / "out").shards["train"])) == 7


def test_a_blend_takes_of_each_source_what_its_weight_samples_and_cap_say(tmp_path):
    layouts.llava_pretrain(tmp_path / "captions")
    layouts.llava_onevision(tmp_path / "ov")
    layouts.finevision(tmp_path / "fv")
    layouts.llava_instruct(tmp_path / "instruct")
    entries = [
        {"path": "captions/blip_laion_cc_sbu_558k.json", "name": "captions", "weight": 0.5},
        {"path": "ov", "samples": 7},
        {"path": "fv", "cap": 5},
        {"path": "instruct/llava_v1_5_mix665k.json", "name": "instruct", "weight": 2.5},
    ]
    (tmp_path / "blend.yaml").write_text(yaml.dump({"sources": entries}))
    manifest = _prepare(tmp_path / "blend.yaml", tmp_path / "out", val_samples=10, shard_samples=20)
    validation = [record["source"] for record in records(tmp_path / "out", "val")]
    training = [record["source"] for record in records(tmp_path / "out")]
    assert len(set(validation)) == 10 and not set(validation) & set(training)
    assert manifest["taken"]["ov"] == 7 and manifest["taken"]["captions"] == 30 and manifest["taken"]["fv"] == 5
    instruct = [source for source in training if source.startswith("instruct")]
    times = {instruct.count(source) for source in instruct}
    assert times == {2, 3}
    assert training[:20] != sorted(training)[:20]  # mixed, not one source after the other


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "x.json", "weigth": 1}, "only"),
        ({"path": "x.json", "weight": 1, "samples": 3}, "one of them"),
        ({"path": "x.json", "weight": -1}, "above 0"),
        ({"path": "x.json", "cap": 1.5}, "above 0"),
        ({"path": "gone.json"}, "does not exist"),
        ({"path": "x.json", "kind": "coco"}, "kind=coco"),
        ({"path": "x.json", "masks": "."}, "has no masks folder"),
        ({}, "must have a path"),
    ],
)
def test_a_blend_with_a_mistake_is_refused_in_one_sentence(tmp_path, entry, message):
    layouts.llava_jsonl(tmp_path / "x.json", [])
    (tmp_path / "blend.yaml").write_text(yaml.dump({"sources": [entry]}))
    with pytest.raises(ValueError, match=message):
        _prepare(tmp_path / "blend.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_unknown_content_asks_for_its_kind(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="kind=llava"):
        _prepare(tmp_path / "photos", tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        _prepare(tmp_path / "nothing", tmp_path / "out")


def test_a_damaged_parquet_file_is_named(tmp_path):
    source = layouts.finevision(tmp_path / "fv")
    file = next(source.rglob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[4:4000] = bytes(3996)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="row group 0 is damaged"):
        _prepare(source, tmp_path / "out")
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="not a readable parquet file"):
        _prepare(source, tmp_path / "other")
