"""The published sets' known oddities: dropped and said so, or repaired by name; what LLaVA's loader takes comes out
with LLaVA's ids and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import prepare
from data_prep.prepare.repairs import REPAIRS, chosen_repairs
from nemo_pre.data.conversation import IGNORE_INDEX, encode
from nemo_pre.data.tokenizer import load_tokenizer
from tests.data.llava_reference import preprocess_v1
from tests.data.sentencepiece_models import slow_tokenizer, write_vicuna_like
from tests.data_prep import layouts
from tests.data_prep.layouts import picture, records, stored, turns

GOOD = 40  # samples without an oddity
TAG = "<image>"


def _turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


# Of llava_v1_5_mix665k.json and its kind: what is odd, by the repair that keeps it.
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "ShareGPT begins with an answer": (
        {"id": "X3zQy_0", "conversations": [_turn("gpt", "I am back."), *turns("Go on.", "So I do.")]},
        "first_answer",
    ),
    "ShareGPT speaks of the tag": (
        {"id": "aBc_1", "model": "", "conversations": turns(f"What does {TAG} mean?", f"{TAG} shows an image.")},
        "text_tag",
    ),
    "an empty answer among good ones": (
        {
            "id": 7,
            "image": "coco/train2017/7.jpg",
            "conversations": turns(f"{TAG}\nWhat?", "") + turns("And?", "A cat."),
        },
        "empty_answer",
    ),
    "an image without a tag": (
        {"id": "8", "image": "vg/VG_100K/8.jpg", "conversations": turns("Is 2 even?", "Yes.")},
        "unseen_image",
    ),
    "a tag twice": (
        {"id": "9", "image": "gqa/images/9.jpg", "conversations": turns(f"{TAG}\nWhat is it? {TAG}", "A dog.")},
        "repeated_tag",
    ),
}
WITHOUT_CURE = {
    "OCR-VQA's covers that are gone": (
        {"id": "x10", "image": "ocr_vqa/images/10.jpg", "conversations": turns(f"{TAG}\nTitle?", "X")},
        "missing_image",
    ),
    "answers that are all empty": ({"id": "x11", "conversations": turns("What?", " ")}, "empty_answer"),
}


def mix665k(folder: Path) -> Path:
    """A file as published: integers among the ids, texts without images, GIFs that are called JPEG, images below five
    folders, tags at either end of a question; then every oddity once."""
    items: list[dict[str, Any]] = []
    for number in range(GOOD):
        kind = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", None)[
            number % 6
        ]
        item: dict[str, Any] = {"id": number if number % 5 == 0 else f"{number:012d}"}
        question = f"What is {number}?"
        if kind is not None:
            item["image"] = f"{kind}/good{number}.jpg"
            question = f"{TAG}\n{question}" if number % 2 else f"{question}\n{TAG}"
            _write(folder / item["image"], picture(number, "GIF" if kind.startswith("ocr") else "JPEG"))
        item["conversations"] = turns(question, "A number.") + turns("And then?", str(number + 1))
        items.append(item)
    for item, _ in [*ODD.values(), *WITHOUT_CURE.values()]:
        items.append(item)
        if "image" in item and "ocr_vqa" not in item["image"]:
            _write(folder / item["image"], picture(1))
    file = folder / "llava_v1_5_mix665k.json"
    file.write_text(json.dumps(items, indent=2))
    return file


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _prepare(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return prepare(str(source), str(out), **{"val_samples": 0, "workers": 1, "shuffle": False, **options})


def test_what_is_lost_is_said_last_with_its_reasons_and_what_may_keep_it(tmp_path, capsys):
    manifest = _prepare(mix665k(tmp_path / "data"), tmp_path / "out")
    assert manifest["dropped"] == {"empty_answer": 2, "image_tags": 3, "missing_image": 1, "wrong_turn_order": 1}
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "LOST 7 of 47 samples, 14.9%: 6.38% image_tags, 4.26% empty_answer, 2.13% missing_image, "
        "2.13% wrong_turn_order."
    )
    assert "repair=first_answer,empty_answer,repeated_tag,unseen_image,untagged_image,text_tag may keep some" in last
    assert str(tmp_path / "out" / "dropped.jsonl") in last
    _prepare(tmp_path / "data" / "llava_v1_5_mix665k.json", tmp_path / "out")  # once more, when nothing is left to do
    assert capsys.readouterr().err.splitlines()[-1] == last


def test_what_is_hardly_lost_is_not_made_much_of(tmp_path, capsys):
    lines = [{"conversations": turns("What?", "That." if number else "")} for number in range(100)]
    assert _prepare(layouts.llava_jsonl(tmp_path / "x.jsonl", lines), tmp_path / "out")["dropped"] == {
        "empty_answer": 1
    }
    assert "LOST" not in capsys.readouterr().err


def test_llavas_repairs_keep_what_llava_takes_and_are_counted(tmp_path, capsys):
    manifest = _prepare(mix665k(tmp_path / "data"), tmp_path / "out", repair="llava")
    assert manifest["repaired"] == {repair: 1 for _, repair in ODD.values()}
    assert manifest["dropped"] == {reason: 1 for _, reason in WITHOUT_CURE.values()}
    assert (
        "repaired 1 empty_answer, 1 first_answer, 1 repeated_tag, 1 text_tag, 1 unseen_image"
        in capsys.readouterr().err
    )
    found = {str(record["id"]): record for record in records(tmp_path / "out")}
    for item, repair in ODD.values():
        assert found[str(item["id"])]["repaired"] == [repair]
    assert [record["id"] for record in found.values() if "repaired" not in record] == [
        str(number) if number % 5 == 0 else f"{number:012d}" for number in range(GOOD)
    ]
    assert [turn["value"] for turn in found["7"]["conversations"]] == [f"{TAG}\nAnd?", "A cat."]
    assert "image" not in found["8"] and [list(m) for m in stored(tmp_path / "out").values()].count(["json"]) == 6 + 3
    assert found["9"]["conversations"][0]["value"] == f"{TAG}\nWhat is it? "
    assert all(turn["image_tags"] is False for turn in found["aBc_1"]["conversations"])


@pytest.mark.parametrize("repair", sorted({repair for _, repair in ODD.values()}))
def test_a_repair_keeps_its_kind_alone(tmp_path, repair):
    manifest = _prepare(mix665k(tmp_path / "data"), tmp_path / "out", repair=[repair])
    assert manifest["repaired"] == {repair: 1}
    assert sum(manifest["dropped"].values()) == len(ODD) + len(WITHOUT_CURE) - 1


@pytest.mark.parametrize("legacy", [True, False])
def test_what_was_repaired_has_llavas_ids_and_labels(tmp_path, legacy):
    """But for the empty answer, after which LLaVA's text runs on without an end of the turn."""
    directory = write_vicuna_like(tmp_path / "vicuna", legacy)
    fast, slow = load_tokenizer(directory), slow_tokenizer(directory)
    _prepare(mix665k(tmp_path / "data"), tmp_path / "out", repair="llava")
    source = {str(r["id"]): r for r in json.loads((tmp_path / "data" / "llava_v1_5_mix665k.json").read_text())}
    compared = 0
    for record in records(tmp_path / "out"):
        if record.get("repaired") == ["empty_answer"]:
            continue
        original = source[str(record["id"])]
        ids, labels, mismatch = preprocess_v1(original["conversations"], slow, has_image="image" in original)
        sample = encode(record["conversations"], fast, "llava_v1", 999, int("image" in record), "here")
        assert not mismatch and sample.tokens == ids[:-1] and [IGNORE_INDEX, *sample.labels] == labels, record
        compared += 1
    assert compared == GOOD + len(ODD) - 1


def test_untagged_images_go_to_the_front_where_that_is_asked_for(tmp_path):
    folder = tmp_path / "data"
    for name in ("a.jpg", "b.jpg"):
        _write(folder / name, picture(3))
    lines = [{"image": ["a.jpg", "b.jpg"], "conversations": turns("Alike?", "Yes.")}]
    source = layouts.llava_jsonl(folder / "x.jsonl", lines)
    manifest = _prepare(source, tmp_path / "out", repair="untagged_image")
    (record,) = records(tmp_path / "out")
    assert record["conversations"][0]["value"] == f"{TAG}\n{TAG}\nAlike?" and manifest["repaired"] == {
        "untagged_image": 1
    }


def test_an_image_whose_question_goes_and_no_other_follows_is_not_moved(tmp_path):
    _write(tmp_path / "data" / "a.jpg", picture(3))
    lines = [
        {"image": "a.jpg", "conversations": turns("Hello.", "Yes?") + turns(f"{TAG}\nWhat?", "")},
        {"conversations": turns("Hello.", "Yes?")},
    ]
    source = layouts.llava_jsonl(tmp_path / "data" / "x.jsonl", lines)
    assert _prepare(source, tmp_path / "out", repair="llava")["dropped"] == {"empty_answer": 1}


def test_a_source_cannot_mark_its_own_tags_as_text(tmp_path):
    lines = [
        {"conversations": [{**turns(f"{TAG}?", "x")[0], "image_tags": False}, turns("", "x")[1]]},
        {"conversations": turns("1?", "1")},
    ]
    source = layouts.llava_jsonl(tmp_path / "x.jsonl", lines)
    assert _prepare(source, tmp_path / "out")["dropped"] == {"image_tags": 1}


def test_repairs_are_chosen_by_name():
    assert chosen_repairs(None) == () and chosen_repairs("[text_tag, first_answer]") == ("first_answer", "text_tag")
    assert set(chosen_repairs("llava")) == set(REPAIRS) - {"untagged_image"}
    with pytest.raises(ValueError, match="repair=everything is not one of llava, first_answer"):
        chosen_repairs(["everything"])
    with pytest.raises(ValueError, match="contradict each other"):
        chosen_repairs("llava,untagged_image")


def test_captions_of_558k_with_their_oddities(tmp_path, capsys):
    """Tags at either end of the question, captions with spaces at an end, file names that are shared."""
    folder = tmp_path / "LLaVA-Pretrain"
    layouts.llava_pretrain(folder, count=120)
    file = folder / "blip_laion_cc_sbu_558k.json"
    items = json.loads(file.read_text())
    items[0]["conversations"] = turns(f"{TAG}\nDescribe it.", " a picture \n")
    items[1]["image"] = items[2]["image"]
    items[3]["conversations"][1]["value"] = ""
    file.write_text(json.dumps(items))
    manifest = _prepare(folder, tmp_path / "out", repair="llava")
    assert manifest["dropped"] == {"empty_answer": 1} and manifest["repaired"] == {}
    assert records(tmp_path / "out")[0]["conversations"][1]["value"] == " a picture \n"
    assert "LOST" not in capsys.readouterr().err


@pytest.mark.parametrize("given", ["llava", "text_tag,first_answer", "[text_tag,first_answer]"])
def test_the_command_line_takes_one_repair_or_several(tmp_path, given):
    from nemo_pre.cli import main

    lines = [{"conversations": [_turn("gpt", "x"), *turns("a", "b")]}]
    source = layouts.llava_jsonl(tmp_path / "x.jsonl", lines)
    words = ["data", "prepare", str(source), str(tmp_path / "out"), "val_samples=0", "workers=1", f"repair={given}"]
    assert main(words) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["repaired"] == {"first_answer": 1}
