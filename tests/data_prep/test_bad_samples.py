"""Whatever is wrong with a sample is found, counted by its reason and listed with its origin, or stops the run."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.prepare import prepare
from tests.data_prep import layouts
from tests.data_prep.layouts import picture, records, stored, turns


def _bomb() -> bytes:
    """A PNG of a few bytes that states 60000 x 60000 pixels."""

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The image root, with a good picture, broken ones, and ways out of it."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "good.jpg").write_bytes(picture(0))
    (root / "text.jpg").write_bytes(b"<html>404</html>")
    (root / "empty.jpg").write_bytes(b"")
    (root / "cut.jpg").write_bytes(picture(0)[:700])
    (root / "cut.png").write_bytes(picture(0, "PNG")[:700])
    (root / "bomb.png").write_bytes(_bomb())
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "up").symlink_to(tmp_path)
    (root / "inside.jpg").symlink_to(root / "good.jpg")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    return root


def _sample(image: Any = "good.jpg", conversations: Any = None) -> dict[str, Any]:
    return {"image": image, "conversations": turns("<image>\n?", "yes") if conversations is None else conversations}


GOOD = [_sample(), _sample("inside.jpg"), {"conversations": turns("1 + 1?", "2")}, _sample("./good.jpg")]
BAD = {
    "broken": ('{"image": "good.jpg", "conv', "broken_record"),
    "no object": ([1, 2], "broken_record"),
    "deep": ("[" * 100_000, "broken_record"),
    "no conversations": ({"image": "good.jpg"}, "broken_record"),
    "a text as conversations": (_sample(conversations="hello"), "broken_record"),
    "no value": (_sample(conversations=[{"from": "human"}, {"from": "gpt", "value": "x"}]), "broken_record"),
    "a number as value": (_sample(conversations=[{"from": "human", "value": 3}]), "broken_record"),
    "a number as image": (_sample(image=[3]), "broken_record"),
    "half a character": (_sample(conversations=turns("<image>", "\ud800")), "broken_record"),
    "no turns": (_sample(conversations=[]), "wrong_turn_order"),
    "starts with the answer": (_sample(conversations=turns("<image>", "x")[::-1]), "wrong_turn_order"),
    "no answer": (_sample(conversations=turns("<image>", "x")[:1]), "wrong_turn_order"),
    "a third speaker": (
        _sample(conversations=[{"from": "system", "value": "s"}, *turns("<image>", "x")]),
        "wrong_turn_order",
    ),
    "empty answer": (_sample(conversations=turns("<image>", " \n")), "empty_answer"),
    "no tag": (_sample(conversations=turns("?", "x")), "image_tags"),
    "two tags": (_sample(conversations=turns("<image><image>", "x")), "image_tags"),
    "a tag without image": ({"conversations": turns("<image>", "x")}, "image_tags"),
    "a tag in the answer": (_sample(conversations=turns("<image>", "<image>")), "image_tags"),
    "missing": (_sample("gone.jpg"), "missing_image"),
    "folder": (_sample("folder.jpg"), "missing_image"),
    "pipe": (_sample("pipe.jpg"), "missing_image"),
    "loop": (_sample("loop.jpg"), "missing_image"),
    "long name": (_sample("x" * 5000), "missing_image"),
    "below a file": (_sample("good.jpg/x"), "missing_image"),
    "up": (_sample("../secret.jpg"), "path_outside_root"),
    "up and down": (_sample("folder.jpg/../good.jpg"), "path_outside_root"),
    "absolute": (_sample("/etc/hostname"), "path_outside_root"),
    "link out": (_sample("out.jpg"), "path_outside_root"),
    "folder link out": (_sample("up/secret.jpg"), "path_outside_root"),
    "zero byte": (_sample("good.jpg\0.png"), "path_outside_root"),
    "no image": (_sample("text.jpg"), "undecodable_image"),
    "empty image": (_sample("empty.jpg"), "undecodable_image"),
    "bomb": (_sample("bomb.png"), "too_many_pixels"),
}


def _prepare(file: Path, **options: Any) -> dict[str, Any]:
    options = {"val_samples": 0, "workers": 1, "images": str(file.parent / "root"), "shuffle": False, **options}
    return prepare(str(file), str(file.parent / "out"), **options)


def test_every_kind_of_bad_sample_is_dropped_counted_and_listed_and_the_good_ones_stay(tmp_path, images):
    cases = list(BAD.values())
    lines = [GOOD[0], *(sample for sample, _ in cases), *GOOD[1:]]
    manifest = _prepare(layouts.llava_jsonl(tmp_path / "x.jsonl", lines))
    listed = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    by_origin = {sample["origin"]: sample["reason"] for sample in listed}
    expected = {f"x.jsonl[{number}]": reason for number, (_, reason) in enumerate(cases, start=1)}
    assert by_origin == expected
    reasons = [reason for _, reason in cases]
    assert manifest["dropped"] == {reason: reasons.count(reason) for reason in set(reasons)}
    assert manifest["splits"]["train"]["samples"] == len(GOOD)
    assert all(members.get("jpg", picture(0)) == picture(0) for members in stored(tmp_path / "out").values())


@pytest.mark.parametrize("case", BAD)
def test_on_error_raise_stops_at_a_bad_sample_and_names_it(tmp_path, images, case):
    bad, reason = BAD[case]
    file = layouts.llava_jsonl(tmp_path / "x.jsonl", [GOOD[0], bad])
    with pytest.raises(ValueError, match=rf"x:x.jsonl\[1\] is bad \({reason}"):
        _prepare(file, on_error="raise")
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_a_cut_image_is_only_found_by_decoding_it(tmp_path, images, name):
    file = layouts.llava_jsonl(tmp_path / "x.jsonl", [GOOD[0], _sample(name)])
    assert _prepare(file, verify_images=True)["dropped"] == {"undecodable_image": 1}
    other = layouts.llava_jsonl(tmp_path / "y.jsonl", [GOOD[0], _sample(name)])
    manifest = prepare(str(other), str(tmp_path / "other"), images=str(images), val_samples=0, workers=1)
    assert manifest["dropped"] == {}


def test_a_mask_that_does_not_fit_its_image_is_dropped(tmp_path):
    source = layouts.coco_stuff(tmp_path / "coco")
    masks = source / "stuffthingmaps_trainval2017"
    Image.new("L", (7, 7)).save(masks / "train2017" / "000000000001.png")
    (masks / "train2017" / "000000000002.png").write_bytes(picture(0))
    (source / "train2017" / "000000000003.jpg").unlink()
    manifest = prepare(str(source), str(tmp_path / "out"), val_samples=0, workers=1)
    assert manifest["dropped"] == {"bad_mask": 2, "missing_image": 1}
    assert len(records(tmp_path / "out")) == 5


def test_a_dataset_of_bad_samples_only_is_no_dataset(tmp_path, images):
    file = layouts.llava_jsonl(tmp_path / "x.jsonl", [_sample("gone.jpg"), _sample("text.jpg")])
    with pytest.raises(ValueError, match="every training sample was dropped .missing_image 1, undecodable_image 1"):
        _prepare(file)
    assert not (tmp_path / "out" / "manifest.json").exists()


# --- parquet --------------------------------------------------------------------------------------------------------


def _parquet(folder: Path, rows: dict[str, list[Any]], types: dict[str, Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    arrays = {name: pa.array(values, types[name]) for name, values in rows.items()}
    pq.write_table(pa.table(arrays), folder / "train-00000.parquet", row_group_size=3)
    return folder


def _texts(*pairs: Any) -> list[Any]:
    return [None if pair is None else {"user": pair[0], "assistant": pair[1]} for pair in pairs]


def _types() -> dict[str, Any]:
    import pyarrow as pa

    picture_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return {
        "list of structs": pa.list_(picture_type),
        "list of bytes": pa.list_(pa.binary()),
        "list of paths": pa.list_(pa.string()),
        "struct": picture_type,
        "large bytes": pa.large_binary(),
        "bytes": pa.binary(),
        "path": pa.string(),
    }


def _as(kind: str, content: bytes) -> Any:
    value: Any = {"bytes": content, "path": None} if "struct" in kind else "one.jpg" if "path" in kind else content
    return [value] if kind.startswith("list") else value


@pytest.mark.parametrize("kind", _types())
@pytest.mark.parametrize("dataset", ["finevision", "llava_onevision"])
def test_a_picture_column_of_any_shape_is_read(tmp_path, dataset, kind):
    import pyarrow as pa

    none = {"bytes": None, "path": None} if kind == "struct" else None
    pictures = [_as(kind, picture(0)), none, _as(kind, picture(0))]
    if dataset == "finevision":
        texts = [_texts(("What?", "This.")), _texts(("1 + 1?", "2")), _texts(("<image>?", "That."))]
        rows = {"images": pictures, "texts": texts}
        types = {"texts": pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))}
    else:
        asked = [turns("<image>?", "This."), turns("1 + 1?", "2"), turns("<image>?", "That.")]
        rows = {"image": pictures, "conversations": asked}
        types = {"conversations": pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))}
    folder = _parquet(tmp_path / "data", rows, {**types, "images": _types()[kind], "image": _types()[kind]})
    (folder / "one.jpg").write_bytes(picture(0))
    prepare(str(folder), str(tmp_path / "out"), val_samples=0, workers=1, shuffle=False, on_error="raise")
    assert [members.get("jpg") for members in stored(tmp_path / "out").values()] == [picture(0), None, picture(0)]


def test_rows_of_parquet_with_nulls_and_other_types_are_dropped_under_their_reason(tmp_path):
    import pyarrow as pa

    cases: list[tuple[Any, Any, str | None]] = [
        ([picture(0)], _texts(("What?", "This.")), None),
        ([picture(0)], _texts(("What?", "This."), None), "broken_record"),
        ([picture(0)], _texts((None, "This.")), "broken_record"),
        ([picture(0)], _texts(("What?", None)), "broken_record"),
        ([picture(0)], _texts(("What?", "")), "empty_answer"),
        ([picture(0)], None, "broken_record"),
        ([picture(0)], [], "wrong_turn_order"),
        ([picture(0), None], _texts(("What?", "This.")), "missing_image"),
        ([b""], _texts(("What?", "This.")), "undecodable_image"),
        ([b"<html>"], _texts(("What?", "This.")), "undecodable_image"),
        (None, _texts(("1 + 1?", "2")), None),
        ([], _texts(("1 + 1?", "2")), None),
        (None, _texts(("<image>?", "2")), "image_tags"),
    ]
    types = {
        "images": pa.list_(pa.binary()),
        "texts": pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())])),
    }
    rows = {"images": [case[0] for case in cases], "texts": [case[1] for case in cases]}
    folder = _parquet(tmp_path / "data", rows, types)
    manifest = prepare(str(folder), str(tmp_path / "out"), val_samples=0, workers=1)
    listed = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    expected = {f"train-00000.parquet[{n}]": reason for n, (_, _, reason) in enumerate(cases) if reason is not None}
    assert {sample["origin"]: sample["reason"] for sample in listed} == expected
    assert manifest["splits"]["train"]["samples"] == 3
    with pytest.raises(ValueError, match=r"data:train-00000.parquet\[1\] is bad \(broken_record: text 1 is null"):
        prepare(str(folder), str(tmp_path / "no"), val_samples=0, workers=1, shuffle=False, on_error="raise")


@pytest.mark.parametrize(
    ("column", "values", "detail"),
    [
        ("texts", ["a question"], "its texts are a str instead of a list"),
        ("texts", [["a question"]], "text 0 is a str instead of"),
        ("texts", [[{"user": "a"}]], "text 0 is a dict instead of"),
        ("texts", [[{"user": 3, "assistant": "a"}]], "the user of text 0 is a int, not a text"),
        ("images", [7], "image 0 is int and neither bytes"),
        ("images", [[[b"x"]]], "image 0 is list and neither bytes"),
        ("images", [[{"bytes": "text", "path": None}]], "image 0 is str and neither bytes"),
        ("images", [[{"bytes": None, "path": None}]], "missing_image: image 0 is null"),
        ("images", [[{"pixels": b"x"}]], "missing_image: image 0 is null"),
    ],
)
def test_a_column_of_another_type_is_told_row_by_row_and_no_traceback(tmp_path, column, values, detail):
    rows = {"images": [[picture(0)]], "texts": [_texts(("What?", "This."))], column: values}
    folder = _parquet(tmp_path / "data", rows, {"images": None, "texts": None})
    with pytest.raises(ValueError, match=rf"data:train-00000.parquet\[0\] is bad .*{detail}"):
        prepare(str(folder), str(tmp_path / "out"), val_samples=0, workers=1, on_error="raise")


def test_text_that_is_not_utf_8_is_its_rows_fault_alone(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([b"What?", b"\xff\xfe", b"Where?"], pa.binary()).view(pa.string())
    pairs = pa.StructArray.from_arrays([texts, pa.array(["a", "b", "c"])], ["user", "assistant"])
    table = pa.table(
        {
            "images": pa.array([None] * 3, pa.list_(pa.binary())),
            "texts": pa.ListArray.from_arrays([0, 1, 2, 3], pairs),
        }
    )
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "x.parquet")
    manifest = prepare(str(tmp_path / "data"), str(tmp_path / "out"), val_samples=0, workers=1)
    assert manifest["dropped"] == {"broken_record": 1} and manifest["splits"]["train"]["samples"] == 2


def test_a_missing_column_is_refused_before_anything_is_read(tmp_path):
    folder = _parquet(tmp_path / "data", {"images": [[picture(0)]]}, {"images": None})
    with pytest.raises(ValueError, match="has no column texts: it is no finevision data"):
        prepare(str(folder), str(tmp_path / "out"), kind="finevision", val_samples=0)
