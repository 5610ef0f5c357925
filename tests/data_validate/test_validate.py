"""Every kind of damage is found where it is, under its own name, and sound data has no findings."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.shards import Sample
from data_prep.validate import validate
from data_prep.validate.check import check
from data_prep.validate.content import Limits
from data_prep.validate.findings import Report
from tests.data_validate.small import edit, picture, record, samples, seal, write

TAR, INDEX = "train-00000.tar", "train-00000.index.json"


def inspect(path: Path, sample: int | None = None, **limits: object) -> Report:
    return check(path, Limits(**limits), workers=1, sample=sample)  # type: ignore[arg-type]


def found(report: Report) -> set[tuple[str, str]]:
    return {(finding.reason, finding.key) for finding in report.findings}


def test_the_digits_have_no_findings_with_one_process_or_two(digits: Path) -> None:
    alone = check(digits, Limits(tokenizer=str(digits / "tokenizer")), workers=1)
    assert (alone.findings, alone.checked) == ([], 400)
    together = check(digits, Limits(), workers=2)
    assert (together.findings, together.checked) == ([], 400)


def test_all_kinds_of_samples_have_no_findings(tmp_path: Path) -> None:
    report = inspect(write(tmp_path))
    assert (report.findings, report.checked) == ([], 8)


def test_a_changed_byte_is_found_by_its_checksum(tmp_path: Path) -> None:
    edit(write(tmp_path) / TAR, lambda tar: tar[:-1] + b"x")
    assert found(inspect(tmp_path)) == {("wrong_checksum", ""), ("tar_trailing_data", "")}


def test_a_missing_and_an_unnamed_file_are_found(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / TAR).rename(tmp_path / "other.tar")
    report = inspect(tmp_path)
    assert {(finding.reason, finding.shard) for finding in report.findings} == {
        ("missing_file", TAR),
        ("stray_file", "other.tar"),
    }
    assert report.checked == 4  # those of the other shard


def test_a_picture_of_one_colour_is_told_and_a_dark_one_is_not(tmp_path: Path) -> None:
    def png(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    dark = Image.new("RGB", (24, 24))
    dark.putpixel((3, 4), (0, 0, 1))
    ramp = (
        300 + np.arange(24 * 24, dtype=np.uint16).reshape(24, 24) * 113
    )  # cut to 255, which it must not be, it is one
    pictures = {
        "a": Image.new("L", (24, 24), 255),
        "b": dark,
        "c": Image.fromarray(ramp),
        "d": Image.new("RGB", (1, 1)),
    }
    train = [(key, {"png": png(image), "json": record(image=f"{key}.png")}) for key, image in pictures.items()]
    write(tmp_path, {"train": train, "val": samples("val")})
    assert found(inspect(tmp_path)) == {("one_colour", "a")}
    assert found(inspect(tmp_path, decode=False)) == set()


def test_a_mask_is_compared_with_its_picture_upright(tmp_path: Path) -> None:
    exif, file, mask = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 12, 3), np.uint8))
    image.save(file, "JPEG", exif=exif)
    Image.fromarray(np.eye(12, 24, dtype=np.uint8)).save(mask, "PNG")
    members = {"jpg": file.getvalue(), "mask.png": mask.getvalue(), "json": record(image="a.jpg")}
    write(tmp_path, {"train": [("a", members)], "val": samples("val")})
    assert found(inspect(tmp_path)) == set()


def test_a_cut_tar_is_found_and_so_is_every_sample_that_it_lacks(tmp_path: Path) -> None:
    write(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    offset, _ = index[2]["members"]["1.webp"]
    edit(tmp_path / TAR, lambda tar: tar[: offset + 10])
    seal(tmp_path)
    assert found(inspect(tmp_path)) == {
        ("tar_truncated", "train-2"),
        ("unreadable_sample", "train-2"),
        ("unreadable_sample", "train-3"),
    }


def test_a_corrupt_header_is_found_though_tarfile_would_take_it_for_the_end(tmp_path: Path) -> None:
    write(tmp_path)
    offset, _ = json.loads((tmp_path / INDEX).read_text())[1]["members"]["json"]
    edit(tmp_path / TAR, lambda tar: tar[: offset - 512 + 150] + b"9" + tar[offset - 512 + 151 :])
    seal(tmp_path)
    assert ("tar_header", "") in found(inspect(tmp_path))


def test_a_key_that_comes_again_is_found(tmp_path: Path) -> None:
    train = samples("train")
    write(tmp_path, {"train": [*train, train[3]], "val": samples("val")})
    assert ("duplicate_key", "train-3") in found(inspect(tmp_path))


def test_a_key_with_a_dot_is_found(tmp_path: Path) -> None:
    write(tmp_path)
    for file in (TAR, INDEX):
        edit(tmp_path / file, lambda content: content.replace(b"train-3", b"tra.n-3"))
    edit(tmp_path / TAR, checksummed)
    seal(tmp_path)
    assert found(inspect(tmp_path)) == {("dot_in_key", "tra"), ("dot_in_key", "tra.n-3")}


def checksummed(tar: bytes) -> bytes:
    """The headers of a tar with their checksums computed anew."""
    blocks = [bytearray(tar[start : start + 512]) for start in range(0, len(tar), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def test_an_index_in_another_order_than_its_tar_is_found(tmp_path: Path) -> None:
    edit(write(tmp_path) / INDEX, lambda index: json.dumps(json.loads(index)[::-1]).encode())
    seal(tmp_path)
    assert found(inspect(tmp_path)) == {("index_order", "train-3")}


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index[0]["members"].pop("mask.png"),
        lambda index: index[0]["members"].update(txt=[512, 4]),
        lambda index: index[0]["members"]["json"].__setitem__(1, 7),
    ],
    ids=["a member left out", "a member too many", "another size"],
)
def test_an_index_with_other_members_than_its_tar_is_found(tmp_path: Path, change: Callable[[list], object]) -> None:
    def changed(content: bytes) -> bytes:
        index = json.loads(content)
        change(index)
        return json.dumps(index).encode()

    edit(write(tmp_path) / INDEX, changed)
    seal(tmp_path)
    assert ("index_disagrees", "train-0") in found(inspect(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'[{"key": "a", "members": {"json": [-1, 5]}}]', b"[" * 9999])
def test_an_index_that_is_none_is_found_and_not_followed(tmp_path: Path, content: bytes) -> None:
    edit(write(tmp_path) / INDEX, lambda _: content)
    seal(tmp_path)
    report = inspect(tmp_path)
    assert found(report) == {("index_unreadable", "")}
    assert report.checked == 4


def with_sample(path: Path, **members: bytes) -> Path:
    """The dataset with one more training sample, whose key is ``bad``."""
    named = {name.replace("_", "."): content for name, content in members.items()}
    bad: Sample = ("bad", named)
    return write(path, {"train": [*samples("train"), bad], "val": samples("val")})


@pytest.mark.parametrize(
    "reason, content",
    [
        ("unreadable_sample", b"{"),
        ("unreadable_sample", b"[" * 100_000),
        ("unreadable_sample", b'{"conversations": 3}'),
        ("unreadable_sample", record("<image> who ?", image="lost.png")),
        ("turns", b'{"conversations": []}'),
        ("turns", b'{"conversations": ["who ?"]}'),
        ("turns", b'{"conversations": [{"from": "gpt", "value": "me"}]}'),
        ("turns", b'{"conversations": [{"from": "human", "value": null}]}'),
        ("broken_text", rb'{"conversations": [{"from": "human", "value": "\ud800"}, {"from": "gpt", "value": "3"}]}'),
        ("empty_answer", record("who ?", " \n")),
        ("empty_answer", b'{"conversations": [{"from": "human", "value": "who ?"}]}'),
        ("more_tags_than_images", None),
        ("too_long", record("who ?", "me " * 20_000)),
    ],
)
def test_a_bad_record_is_found(tmp_path: Path, reason: str, content: bytes | None) -> None:
    if content is None:
        with_sample(tmp_path, png=picture(7, "PNG"), json=record("<image> <image> who ?", image="7.png"))
    else:
        with_sample(tmp_path, json=content)
    assert found(inspect(tmp_path)) == {(reason, "bad")}


def test_pictures_without_a_question_are_no_finding(tmp_path: Path) -> None:
    alone = b'{"image": "7.png", "conversations": [{"from": "human", "value": "<image>"}]}'
    assert not inspect(with_sample(tmp_path, png=picture(7, "PNG"), json=alone)).findings


def test_images_and_tags_that_do_not_match_are_found(tmp_path: Path) -> None:
    image = picture(7, "PNG")
    with_sample(tmp_path / "none", png=image, json=record("who ?", image="7.png"))
    assert found(inspect(tmp_path / "none")) == {("image_without_tag", "bad")}
    with_sample(tmp_path / "fewer", **{"0_png": image, "1_png": image}, json=record(image=["a.png", "b.png"]))
    assert found(inspect(tmp_path / "fewer")) == {("fewer_tags_than_images", "bad")}
    with_sample(tmp_path / "gap", **{"0_png": image, "2_png": image}, json=record("<image><image>who ?"))
    assert ("image_members", "bad") in found(inspect(tmp_path / "gap"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_cut_image_is_found_by_decoding_and_not_by_its_header(tmp_path: Path, kind: str) -> None:
    content = picture(7, kind, side=64)
    extension = {"JPEG": "jpg"}.get(kind, kind.lower())
    with_sample(tmp_path, **{extension: content[:-200]}, json=record(image="cut"))
    assert found(inspect(tmp_path)) == {("image_undecodable", "bad")}
    if kind != "WEBP":  # whose header states the size of the file
        assert not inspect(tmp_path, decode=False).findings


def test_a_decompression_bomb_is_found_without_being_decoded(tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    def bomb(side: int) -> bytes:
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        # No pixel follows: an attempt to decode it would say so.
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")

    for side in (9_000, 50_000):  # below and above what Pillow itself refuses
        with_sample(tmp_path / str(side), png=bomb(side), json=record(image="bomb.png"))
        assert found(inspect(tmp_path / str(side))) == {("image_too_large", "bad")}


def test_a_mask_of_another_size_is_found(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (5, 5)).save(buffer, "PNG")
    with_sample(tmp_path, png=picture(7, "PNG"), mask_png=buffer.getvalue(), json=record(image="7.png"))
    assert found(inspect(tmp_path)) == {("mask_size", "bad")}


def test_the_same_question_about_the_same_image_in_two_splits_is_found(tmp_path: Path) -> None:
    train, val = samples("train"), samples("val")
    shared = picture(9, "JPEG")
    train.append(("a", {"jpg": shared, "json": record("<image>\nhow many ?")}))
    val.append(("b", {"jpg": shared, "json": record("how many ?\n<image>", answer="4")}))
    val.append(("c", {"jpg": shared, "json": record("<image>\nwhere ?")}))
    val.append(("d", {"jpg": picture(10, "JPEG"), "json": record("<image>\nhow many ?")}))
    report = inspect(write(tmp_path, {"train": train, "val": val}))
    assert found(report) == {("duplicate_across_splits", "b")}
    assert report.findings[0].detail == f"asks what a of {TAR} asks"


def test_tokens_are_counted_and_unknown_characters_found_with_a_tokenizer(digits: Path) -> None:
    tokenizer = str(digits / "tokenizer")
    assert inspect(digits, tokenizer=tokenizer, max_tokens=5).counts["too_long"] == 400
    assert not inspect(digits, tokenizer=tokenizer).findings


def test_characters_that_the_tokenizer_does_not_know_are_found(digits: Path, tmp_path: Path) -> None:
    with_sample(tmp_path, json=record("how many \u4e09 ?"))
    assert ("unknown_text", "bad") in found(inspect(tmp_path, tokenizer=str(digits / "tokenizer")))


def test_a_manifest_whose_sums_are_wrong_is_found(tmp_path: Path) -> None:
    edit(write(tmp_path) / "manifest.json", lambda content: content.replace(b'{"samples": 4', b'{"samples": 5', 1))
    assert found(inspect(tmp_path)) == {("sample_count", "")}


def test_a_number_of_samples_that_no_tar_could_hold_is_not_followed(tmp_path: Path) -> None:
    edit(
        write(tmp_path) / "manifest.json",
        lambda content: content.replace(b'"samples": 4', b'"samples": 4' + b"0" * 15),
    )
    report = inspect(tmp_path)
    assert report.counts["sample_count"] == 2 and report.checked == 0


def test_a_sample_of_the_data_is_drawn_from_all_shards(digits: Path) -> None:
    report = inspect(digits, sample=50)
    assert report.checked == 50 and report.sampled


def test_the_verb_reports_every_finding_and_ends_with_code_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_sample(tmp_path / "data", json=b"{")
    with pytest.raises(SystemExit) as end:
        validate(str(data), workers=1, report=str(tmp_path / "report.json"))
    assert end.value.code == 1
    written = json.loads((tmp_path / "report.json").read_text())
    assert not written["clean"] and written["counts"] == {"unreadable_sample": 1}
    assert [(f["shard"], f["key"], f["reason"]) for f in written["findings"]] == [(TAR, "bad", "unreadable_sample")]
    printed = capsys.readouterr().out
    assert "1  unreadable_sample" in printed and f"{TAR} bad: " in printed


def test_the_verb_returns_where_nothing_is_found_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    data = str(write(tmp_path / "data"))
    assert validate(data, workers=1)["clean"]
    for wrong in ({"workers": 0}, {"sample": 0}, {"max_pixels": 0}, {"tokenizer": str(tmp_path)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            validate(data, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="manifest"):
        validate(str(tmp_path))


def test_shards_in_folders_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for end in ("tar", "index.json"):
            shutil.move(tmp_path / f"{split}-00000.{end}", tmp_path / split / f"00000.{end}")
    edit(tmp_path / "manifest.json", lambda m: m.replace(b"train-0", b"train/0").replace(b"val-0", b"val/0"))
    edit(tmp_path / "val" / "00000.tar", lambda tar: tar[:-1] + b"x")
    assert {finding.shard for finding in inspect(tmp_path).findings} == {"val/00000.tar"}
