"""The emoji dataset: its bytes, its splits, whether its answers are true of its pictures, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.emoji import prepare
from data_prep.emoji.packages import code
from data_prep.emoji.pictures import main_colour
from data_prep.emoji.questions import SHARES, with_article
from data_prep.emoji.splits import PLACES
from data_prep.validate.check import check
from data_prep.validate.content import Limits
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.shards import ShardedSamples
from tests.data_prep import emoji_packages as made
from tests.data_prep.layouts import tree

ASKED = {
    "num_scenes": 400,
    "seed": 3,
    "held_out_style": "fluent-3d",
    "held_out_concepts": 0.25,
    "val_fraction": 0.125,
    "scenes_per_shard": 64,
    "workers": 1,
}
SPLITS = {"train": 200, "val": 50, "val_style": 50, "val_concept": 50, "val_pair": 50}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return made.write_all(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def emoji(packages, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "emoji"
    prepare([str(packages)], out, **ASKED)
    return out


def _samples(directory: Path, split: str) -> ShardedSamples:
    return ShardedSamples(read_manifest(directory).shards[split])


def _records(directory: Path, split: str) -> list[dict]:
    samples = _samples(directory, split)
    return [samples.read(position).record for position in range(len(samples))]


def _shown(directory: Path, split: str) -> list[dict]:
    return [
        picture
        for record in _records(directory, split)
        for picture in record.get("scene", {"pictures": []})["pictures"]
    ]


def test_the_bytes_depend_on_options_and_packages_but_not_on_processes_or_on_how_packages_come(
    emoji, packages, tmp_path
):
    (tmp_path / "other").mkdir()
    google = made.write_folder(tmp_path / "other" / "g", made.datasource("google"))
    twitter = made.write_archive(tmp_path / "other" / "t.tgz", made.datasource("twitter"))
    fluent = made.write_archive(tmp_path / "other" / "f.tar.gz", made.fluent())
    prepare([str(fluent), str(twitter), str(google)], tmp_path / "two", **{**ASKED, "workers": 2})
    assert tree(tmp_path / "two") == tree(emoji)
    with pytest.raises(ValueError, match="holds other data"):
        prepare([str(packages)], tmp_path / "two", **{**ASKED, "seed": 4})
    (google / "img/google/64" / f"{made.codes(3)}.png").write_bytes(made._picture(4, 64, "PNG"))
    with pytest.raises(ValueError, match="holds other data"):
        prepare([str(tmp_path / "other")], tmp_path / "two", **ASKED)


def test_what_is_lost_is_written_again_and_what_is_whole_is_left(emoji, packages, tmp_path, capsys):
    expected = tree(emoji)
    (emoji / "val_pair" / "manifest.json").unlink()
    (emoji / "val_style-00000.tar").unlink()
    prepare([str(packages)], emoji, **ASKED)
    assert tree(emoji) == expected
    prepare([str(packages)], emoji, **ASKED)
    assert "nothing to do" in capsys.readouterr().err


def test_the_manifests_state_what_is_there_and_validation_finds_nothing(emoji):
    manifest = json.loads((emoji / "manifest.json").read_text())
    assert {split: content["samples"] for split, content in manifest["splits"].items()} == SPLITS
    assert manifest["classes"] == ["animals and nature", "food and drink", "objects"]
    assert manifest["concepts"] == len(made.THINGS)
    assert manifest["left_out"] == {
        "category Flags": 1,
        "clock face": 1,
        "not in fluent-3d and google and twitter": 1,
        "variant of another concept": 2,
    }
    assert set(manifest["splits"]["train"]["questions"]) == set(SHARES)
    assert set(manifest["parameters"]["packages"]) == {"fluent-3d", "google", "twitter"}
    assert check(emoji, Limits(), workers=1).findings == []
    for split in ("val_style", "val_concept", "val_pair"):
        assert check(emoji / split, Limits(), workers=1).findings == []
        assert _records(emoji / split, "val") == _records(emoji, split)
        assert read_manifest(emoji / split).fingerprint == read_manifest(emoji).fingerprint


def test_training_never_sees_what_is_held_out(emoji):
    shown = {split: _shown(emoji, split) for split in SPLITS}
    styles = {split: {picture["style"] for picture in pictures} for split, pictures in shown.items()}
    assert styles.pop("val_style") == {"fluent-3d"}
    assert set(map(frozenset, styles.values())) == {frozenset(("google", "twitter"))}

    names = {split: {picture["name"] for picture in pictures} for split, pictures in shown.items()}
    assert len(names["train"]) == 21 and len(names["val_concept"]) == 7
    assert not names["train"] & names["val_concept"]
    assert names["val"] | names["val_style"] | names["val_pair"] <= names["train"]
    asked = " ".join(str(record["conversations"]) for record in _records(emoji, "train"))
    assert not any(name in asked for name in names["val_concept"])

    pairs = {split: {(picture["name"], picture["place"]) for picture in pictures} for split, pictures in shown.items()}
    for split in ("val", "val_style"):
        assert not pairs[split] & pairs["val_pair"]
    assert not pairs["train"] & pairs["val_pair"]
    assert max(Counter(name for name, _ in pairs["val_pair"]).values()) <= 2
    assert "center" not in {place for _, place in pairs["val_pair"]}


def _answer(question: str, scene: dict) -> str | set[str]:
    """The answer, or those that are right, from the record alone: a second opinion without the generator's code."""
    pictures = scene["pictures"]
    names = [picture["name"] for picture in pictures]
    if question in ("What is this?", "What does the picture show?"):
        assert scene["layout"] == "single"
        return names[0]
    if (place := re.fullmatch(r"(What (?:is|do you see)|What kind of thing is) at the (.*)\?", question)) is not None:
        field = "category" if "kind" in place[1] else "name"
        (found,) = [picture[field] for picture in pictures if picture["place"] == place[2]]
        return str(found)
    if question in ("How many pictures are there?", "How many things do you see?"):
        return str(len(pictures))
    if (many := re.fullmatch(r"How many of them are (.*)\?", question)) is not None:
        return str(sum(picture["category"] == many[1] for picture in pictures))
    if (there := re.fullmatch(r"(?:Is there|Do you see) (?:an? )?(.*)\?", question)) is not None:
        return "yes" if there[1] in names else "no"
    if (larger := re.fullmatch(r"Which is larger, the (.*) or the (.*)\?", question)) is not None:
        boxes = {picture["name"]: picture["box"] for picture in pictures}
        sides = {name: max(x1 - x0, y1 - y0) for name, (x0, y0, x1, y1) in boxes.items() if name in larger.groups()}
        assert max(sides.values()) >= 1.3 * min(sides.values())
        return max(sides, key=lambda name: sides[name])
    if question == "What colour is it mostly?":
        return str(pictures[0]["colour"])
    if (colour := re.fullmatch(r"What colour is the (.*) mostly\?", question)) is not None:
        return str(pictures[names.index(colour[1])]["colour"])
    if question == "What kind of thing is this?":
        return str(pictures[0]["category"])
    if question in ("Name them from left to right.", "What does the row show, from left to right?"):
        return ", ".join(p["name"] for p in sorted(pictures, key=lambda p: p["box"][0] + p["box"][2]))
    raise AssertionError(question)


def test_every_answer_is_right(emoji):
    category = {name: made._entry(number)["category"].lower() for number, (name, _, _) in enumerate(made.THINGS)}
    seen: Counter[str] = Counter()
    for split in SPLITS:
        for record in _records(emoji, split):
            values = [message["value"] for message in record["conversations"]]
            for question, answer, kind in zip(values[::2], values[1::2], record["question_types"], strict=True):
                question = question.removeprefix("<image>\n")
                seen[kind] += 1
                if kind == "text":
                    asked = re.fullmatch(r"What kind of thing is (?:an? )?(.*)\?", question)
                    assert asked and answer == category[asked[1]].replace("&", "and")
                elif kind == "caption":
                    assert answer[0].isupper() and answer.endswith(".")
                    for picture in record["scene"]["pictures"]:
                        assert picture["name"].lower() in answer.lower()
                        assert record["scene"]["layout"] != "scattered" or f"at the {picture['place']}" in answer
                else:
                    assert _answer(question, record["scene"]) == answer, record
            for picture in record.get("scene", {"pictures": []})["pictures"]:
                assert picture["colour"] == picture["name"].split()[0]
                assert picture["category"] == category[picture["name"]].replace("&", "and")
    assert set(seen) == set(SHARES)


def test_masks_boxes_and_places_agree_with_the_picture(emoji):
    samples = _samples(emoji, "train")
    places = [name for row in PLACES for name in row]
    layouts: set[str] = set()
    for position in range(len(samples)):
        raw = samples.read(position)
        if raw.image is None:
            continue
        picture = np.asarray(Image.open(io.BytesIO(raw.image)))
        mask = np.asarray(Image.open(io.BytesIO(samples.read_member(position, "mask.png"))))
        assert picture.shape == (112, 112, 3) and mask.shape == (112, 112)
        scene = raw.record["scene"]
        layouts.add(scene["layout"])
        assert sorted(set(mask.flat) - {0}) == [placed["instance"] for placed in scene["pictures"]]
        assert ("concept" in raw.record) == (scene["layout"] == "single")
        for placed in scene["pictures"]:
            rows, columns = np.nonzero(mask == placed["instance"])
            x0, y0, x1, y1 = placed["box"]
            assert x0 <= columns.min() <= columns.max() < x1 and y0 <= rows.min() <= rows.max() < y1
            if scene["layout"] == "scattered":
                cell = int((y0 + y1) / 2 // (112 / 3)) * 3 + int((x0 + x1) / 2 // (112 / 3))
                assert places[cell] == placed["place"]
            inside = picture[mask == placed["instance"]].astype(int).mean(axis=0)
            assert np.abs(inside - made.COLOURS[placed["name"].split()[0]]).max() < 30
    assert layouts == {"single", "scattered", "row"}


def test_diagnostics_take_a_picture_for_its_category(emoji):
    from nemo_pre.diagnostics.samples import read_data

    data = read_data(emoji / "val_style", 60, 20, label="concept")
    assert data.background == 0
    assert data.class_names == {0: "background", 1: "animals and nature", 2: "food and drink", 3: "objects"}
    assert [task.name for task in data.tasks] == ["presence", "count", "label"]
    samples = _samples(emoji / "val_style", "val")
    for position, sample in zip(data.test, data.test_samples(), strict=True):
        pictures = samples.read(position).record["scene"]["pictures"]
        held = set(np.asarray(sample.mask).flat) - {0}
        assert {data.class_names[number] for number in held} == {picture["category"] for picture in pictures}
        count = data.tasks[0].size
        assert sample.truth[count + len(pictures)] == 1


def test_single_pictures_alone_are_a_set_too_and_the_sheet_shows_the_first(packages, tmp_path):
    manifest = prepare([str(packages)], tmp_path / "out", **ASKED, singles=True, sheet=str(tmp_path / "sheet.png"))
    assert set(manifest["splits"]) == set(SPLITS) - {"val_pair"}
    records = [record for record in _records(tmp_path / "out", "train") if "scene" in record]
    assert {record["scene"]["layout"] for record in records} == {"single"}
    assert all(record["concept"] == record["scene"]["pictures"][0]["name"] for record in records)
    assert set(manifest["splits"]["train"]["questions"]) == {"name", "colour", "category", "caption", "text"}
    assert Image.open(tmp_path / "sheet.png").width > 6 * 112


def test_fewer_concepts_and_fewer_types_of_question_are_a_smaller_task(emoji, packages, tmp_path):
    asked = {**ASKED, "num_concepts": 24, "questions": "count, colour,text"}
    manifest = prepare([str(packages)], tmp_path / "few", **asked)
    assert manifest["concepts"] == 24
    names, whole = ({p["name"] for split in SPLITS for p in _shown(of, split)} for of in (tmp_path / "few", emoji))
    assert len(names) == 24 < len(whole) == 28
    kinds: Counter[str] = Counter()
    for split in SPLITS:
        for record in _records(tmp_path / "few", split):
            kinds.update(record["question_types"])
            assert len(record["conversations"]) == 2 * len(record["question_types"]) in (2, 4)
    assert {*kinds} == {"count", "colour", "text"}, "of each there is some, and of others none"
    assert prepare([str(packages)], tmp_path / "few", **asked) == manifest
    assert tree(tmp_path / "few") != tree(emoji)
    other = prepare([str(packages)], tmp_path / "other", **{**asked, "seed": 4})
    assert {p["name"] for split in SPLITS for p in _shown(tmp_path / "other", split)} != names
    assert other["parameters"]["questions"] == "count, colour,text"


def test_a_single_type_is_asked_once(packages, tmp_path):
    prepare([str(packages)], tmp_path / "one", **{**ASKED, "questions": "name", "singles": True})
    for record in _records(tmp_path / "one", "train"):
        assert record["question_types"] == ["name"] and len(record["conversations"]) == 2


def test_without_anything_held_out_there_are_train_val_and_pairs(packages, tmp_path):
    asked = {**ASKED, "held_out_style": None, "held_out_concepts": 0.0, "num_scenes": 24, "val_fraction": 0.1}
    manifest = prepare([str(packages)], tmp_path / "out", **asked)
    assert set(manifest["splits"]) == {"train", "val", "val_pair"}
    assert manifest["splits"]["train"]["concepts"] == len(made.THINGS)


def test_openmojis_drawings_and_names(packages, tmp_path):
    pytest.importorskip("resvg_py", reason="the extra emoji, which draws SVG, is not installed")
    archive = made.write_archive(tmp_path / "openmoji-17.0.0.tgz", made.openmoji())
    asked = {**ASKED, "held_out_style": "openmoji", "num_scenes": 40, "val_fraction": 0.1}
    manifest = prepare([str(packages), str(archive)], tmp_path / "out", **asked)
    assert manifest["names_from"] == "openmoji annotations"
    assert "resvg-py" in manifest["libraries"]
    shown = _shown(tmp_path / "out", "val_style")
    assert {picture["style"] for picture in shown} == {"openmoji"}
    for picture in shown:
        assert picture["name"].startswith(f"small {picture['colour']} ")
        x0, y0, x1, y1 = picture["box"]
        assert (x1 - x0) / (y1 - y0) == pytest.approx(54 / 36, rel=0.1)


def test_without_resvg_svg_is_refused_by_name(packages, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    archive = made.write_archive(tmp_path / "openmoji-17.0.0.tgz", made.openmoji())
    with pytest.raises(ValueError, match="resvg-py, which draws them, is not installed"):
        prepare([str(packages), str(archive)], tmp_path / "out", **{**ASKED, "held_out_style": "openmoji"})


def _without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in names}


def _entries(**changes: object) -> bytes:
    return json.dumps([{**made._entry(number), **changes} for number in range(len(made.THINGS))]).encode()


@pytest.mark.parametrize(
    "files, told",
    [
        (_without(made.datasource("google"), "package.json"), "has no package.json"),
        ({**made.datasource("google"), "package.json": b"{"}, "package.json is not JSON"),
        ({**made.datasource("google"), "package.json": b"[]"}, "has no name or no version"),
        ({**made.datasource("google"), "package.json": b'{"name": "left-pad", "version": "1"}'}, "is left-pad, whose"),
        (made.datasource("google") | {"package.json": b'{"name": "openmoji", "version": "1"}'}, "holds no pictures"),
        (_without(made.datasource("google"), "emoji.json"), "no package has emoji.json"),
        ({**made.datasource("google"), "emoji.json": b"{}"}, "is not a list of emoji"),
        ({**made.datasource("google"), "emoji.json": _entries(category=None)}, "entry 0 of emoji.json has no text in"),
        ({**made.datasource("google"), "emoji.json": _entries(category="Symbols")}, "share 0 concepts"),
        ({**made.datasource("google"), "emoji.json": _entries(name="SAME")}, "share 1 concepts"),
        ({**made.datasource("google"), "img/google/64/1f400.png": b"GIF"}, "1f400.png is not a picture"),
        ({**made.datasource("google"), "img/google/64/1f400.png": made._picture(0, 64, "PNG")[:90]}, "not a picture"),
    ],
)
def test_a_damaged_package_is_one_sentence(files, told, tmp_path):
    archive = made.write_archive(tmp_path / "one.tgz", files)
    with pytest.raises(ValueError, match=re.escape(told)):
        prepare([str(archive)], tmp_path / "out", **{**ASKED, "held_out_style": None})
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"packages": []}, "packages is empty"),
        ({"packages": ["nowhere.tgz"]}, "packages=nowhere.tgz does not exist"),
        ({"held_out_style": "openmoji"}, "held_out_style=openmoji: the styles given are fluent-3d, google, twitter"),
        ({"held_out_concepts": 0.1}, "held_out_concepts=0.1 of 28 concepts are 3"),
        ({"held_out_concepts": -0.1}, "held_out_concepts=-0.1"),
        ({"val_fraction": 0.2}, "val_fraction=0.2"),
        ({"val_fraction": float("nan")}, "val_fraction=nan"),
        ({"num_scenes": 4}, "num_scenes=4: give more than 4"),
        ({"num_concepts": 29}, "num_concepts=29: the packages share 28"),
        ({"num_concepts": 19}, "num_concepts=19: give at least 20"),
        ({"questions": "name,color"}, "questions=name,color: color is not asked; give some of name,place,"),
        ({"questions": ""}, "questions=:  is not asked"),
        ({"questions": "count", "singles": True}, "questions=count: count is not asked of single pictures"),
        ({"questions": "text", "singles": True}, "give a type that asks for a picture, too"),
        ({"questions": "name,read,text"}, "give one of place,count,exists,"),
        ({"image_size": 16}, "image_size=16: give at least 48"),
        ({"sheet": "nowhere/sheet.png"}, "sheet=nowhere/sheet.png: its folder does not exist"),
        ({"sheet": "sheet.jpg"}, "ends in .png"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(changes, told, packages, tmp_path):
    asked = {"packages": [str(packages)], **ASKED, **changes}
    with pytest.raises(ValueError, match=re.escape(told)):
        prepare(out=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_places_that_hold_no_package_are_refused(packages, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "cut.tgz").write_bytes((packages / "emoji-datasource-google-16.0.0.tgz").read_bytes()[:2000])
    twice = made.write_archive(tmp_path / "again.tgz", made.datasource("google"))
    for places, told in (
        (["empty"], "has neither a package.json nor archives"),
        (["notes.txt"], "is no archive of npm"),
        (["cut.tgz"], "cannot be read as an archive"),
        ([twice.name, str(packages)], "are both of the style google"),
    ):
        with pytest.raises(ValueError, match=told):
            prepare([str(tmp_path / place) for place in places], tmp_path / "out", **ASKED)


def test_codes_are_told_alike_whatever_a_package_writes():
    assert code("1F441-FE0F") == code("1f441") == "1f441"
    assert code("1F441-FE0F-200D-1F5E8") == "1f441-200d-1f5e8"


@pytest.mark.parametrize(
    "name, said",
    [
        ("dog face", "a dog face"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("grapes", "grapes"),
        ("ballet shoes", "ballet shoes"),
        ("bus", "a bus"),
        ("wine glass", "a wine glass"),
        ("nest with eggs", "a nest with eggs"),
        ("grinning face with big eyes", "a grinning face with big eyes"),
        ("x-ray", "an x-ray"),
    ],
)
def test_articles(name, said):
    assert with_article(name) == said


@pytest.mark.parametrize(
    "colour, name",
    [
        ((10, 10, 10), "black"),
        ((250, 250, 250), "white"),
        ((128, 128, 128), "grey"),
        ((221, 46, 68), "red"),
        ((244, 144, 12), "orange"),
        ((255, 204, 77), "yellow"),
        ((92, 145, 59), "green"),
        ((59, 136, 195), "blue"),
        ((146, 102, 204), "purple"),
        ((244, 171, 186), "pink"),
        ((138, 75, 43), "brown"),
        ((121, 58, 45), "brown"),
        ((140, 20, 30), "red"),
    ],
)
def test_a_colour_has_the_name_that_people_give_it_and_a_half_of_two_has_none(colour, name):
    sprite = np.full((16, 16, 4), 255, np.uint8)
    sprite[..., :3] = colour
    assert main_colour(sprite) == name
    sprite[:8, :, :3] = (0, 255, 0) if name != "green" else (255, 0, 0)
    assert main_colour(sprite) is None
    sprite[:8, :, 3] = 0  # what is transparent does not count
    assert main_colour(sprite) == name
