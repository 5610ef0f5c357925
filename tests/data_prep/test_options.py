"""What the options do: order, splits, subsets, shard sizes, and images written anew."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_prep.prepare import prepare
from data_prep.prepare.plan import Options, draw_order
from nemo_pre.data.decoding import decode
from tests.data_prep import layouts
from tests.data_prep.layouts import picture, records, stored, tree


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return layouts.llava_pretrain(tmp_path_factory.mktemp("source") / "captions")


def _prepare(source, out, **options):  # type: ignore[no-untyped-def]
    return prepare(str(source), str(out), **{"val_samples": 5, "workers": 1, **options})


def _numbers(out, split="train"):  # type: ignore[no-untyped-def]
    return [int(record["id"]) for record in records(out, split)]


def test_the_shuffle_is_global_and_of_the_seed(source, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        _prepare(source, tmp_path / out, seed=seed, shard_samples=7)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    a, c = _numbers(tmp_path / "a"), _numbers(tmp_path / "c")
    assert a != c and set(_numbers(tmp_path / "a", "val")) != set(_numbers(tmp_path / "c", "val"))
    first_shard = a[:7]
    assert min(first_shard) < 20 and max(first_shard) > 40  # not from one place of the source


def test_without_shuffle_the_order_is_the_sources_and_the_split_still_random(source, tmp_path):
    _prepare(source, tmp_path / "out", shuffle=False)
    numbers, held_out = _numbers(tmp_path / "out"), _numbers(tmp_path / "out", "val")
    assert numbers == sorted(numbers) and held_out == sorted(held_out)
    assert sorted(numbers + held_out) == list(range(60)) and held_out != list(range(5))


def test_a_subset_is_part_of_a_larger_subset_of_the_same_seed(source, tmp_path):
    for size in (10, 30):
        _prepare(source, tmp_path / str(size), subset=size, val_samples=2)
    small, large = (_numbers(tmp_path / n) + _numbers(tmp_path / n, "val") for n in ("10", "30"))
    assert len(small) == 10 and len(large) == 30 and set(small) < set(large)


def test_shards_keep_to_the_number_and_the_bytes_they_may_have(source, tmp_path, monkeypatch):
    _prepare(source, tmp_path / "out", shard_samples=25)
    files = [file.name for file in sorted((tmp_path / "out").glob("*.tar"))]
    assert files == ["train-00000.tar", "train-00001.tar", "train-00002.tar", "val-00000.tar"]
    large = tmp_path / "large"
    (large / "images").mkdir(parents=True)
    lines = []
    for number in range(6):
        size = (1200, 1000) if number == 3 else (400, 300)
        (large / "images" / f"{number}.bmp.png").write_bytes(picture(number, "PNG", size))
        lines.append({"id": number, "image": f"{number}.bmp.png", "conversations": layouts.turns("<image>", "x")})
    layouts.llava_jsonl(large / "x.jsonl", lines)
    manifest = _prepare(large / "x.jsonl", tmp_path / "small", shard_mb=1, val_samples=0, shuffle=False)
    shards = manifest["splits"]["train"]["shards"]
    assert [entry["samples"] for entry in shards] == [2, 1, 1, 2]
    assert [entry["bytes"] > 1e6 + 20_000 for entry in shards] == [False, False, True, False]
    assert [entry["file"] for entry in shards][:2] == ["train-00000.tar", "train-00000-1.tar"]
    assert sorted(_numbers(tmp_path / "small")) == list(range(6))


def test_larger_images_are_shrunk_and_the_others_left_alone(tmp_path):
    (tmp_path / "large.png").write_bytes(picture(0, "PNG", (200, 100)))
    (tmp_path / "small.png").write_bytes(picture(1, "PNG", (50, 100)))
    lines = [{"image": f"{n}.png", "conversations": layouts.turns("<image>", "x")} for n in ("large", "small")]
    layouts.llava_jsonl(tmp_path / "x.jsonl", lines)
    _prepare(tmp_path / "x.jsonl", tmp_path / "out", max_pixels=5000, val_samples=0, shuffle=False)
    large, small = stored(tmp_path / "out").values()
    assert small["png"] == picture(1, "PNG", (50, 100))
    assert Image.open(io.BytesIO(large["png"])).size == (100, 50)
    index = json.loads((tmp_path / "out" / "train-00000.index.json").read_text())
    assert [entry["image_sizes"] for entry in index] == [[[100, 50]], [[50, 100]]]


def test_a_mask_shrinks_with_its_image_and_keeps_its_labels(tmp_path):
    source = layouts.coco_stuff(tmp_path / "coco")
    rng = np.random.default_rng(0)
    for file in (source / "stuffthingmaps_trainval2017").rglob("*.png"):
        Image.fromarray(rng.choice(np.array([3, 250], np.uint8), (32, 40))).save(file)
    _prepare(source, tmp_path / "out", max_pixels=320, val_samples=0)
    for members in stored(tmp_path / "out").values():
        mask = Image.open(io.BytesIO(members["mask.png"]))
        assert mask.size == Image.open(io.BytesIO(members["jpg"])).size == (20, 16)
        assert set(np.unique(np.array(mask))) == {3, 250}


@pytest.mark.parametrize(("encoding", "extension"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_reencode_writes_every_image_in_one_format_even_transparent_and_grey_ones(tmp_path, encoding, extension):
    for number, mode in enumerate(("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")):
        Image.new(mode, (9, 8)).save(tmp_path / f"{number}.img", "TIFF")
    lines = [{"image": f"{number}.img", "conversations": layouts.turns("<image>", "x")} for number in range(8)]
    layouts.llava_jsonl(tmp_path / "x.jsonl", lines)
    _prepare(tmp_path / "x.jsonl", tmp_path / "out", reencode=encoding, val_samples=0, on_error="raise")
    samples = list(stored(tmp_path / "out").values())
    assert len(samples) == 8
    for members in samples:
        assert Image.open(io.BytesIO(members[extension])).size == (9, 8)


def test_what_is_written_anew_stands_upright_and_deep_grey_keeps_its_shades(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    ramp = np.arange(256, dtype=np.uint8).reshape(8, 32)
    image.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    lines = [{"image": name, "conversations": layouts.turns("<image>", "x")} for name in ("turned.png", "deep.tif")]
    layouts.llava_jsonl(tmp_path / "x.jsonl", lines)
    for out, options in (("kept", {}), ("anew", {"reencode": "png"}), ("shrunk", {"max_pixels": 300})):
        _prepare(tmp_path / "x.jsonl", tmp_path / out, val_samples=0, shuffle=False, **options)
        turned, deep = (decode(members["png"]) for members in stored(tmp_path / out).values())
        index = json.loads((tmp_path / out / "train-00000.index.json").read_text())
        assert [entry["image_sizes"] for entry in index] == [[list(turned.size)], [list(deep.size)]]
        if out != "shrunk":
            assert (np.asarray(turned) == np.rot90(np.asarray(image), -1)).all()
            assert deep.mode == "L" and (np.asarray(deep) == ramp).all()
        else:
            assert turned.size == (14, 21)


def test_a_format_the_reader_does_not_know_becomes_a_png_of_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", "BMP")
    layouts.llava_jsonl(tmp_path / "x.jsonl", [{"image": "x.jpg", "conversations": layouts.turns("<image>", "x")}])
    _prepare(tmp_path / "x.jsonl", tmp_path / "out", val_samples=0)
    (members,) = stored(tmp_path / "out").values()
    assert (np.array(Image.open(io.BytesIO(members["png"]))) == pixels).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": 0}, "subset=0"),
        ({"subset": 61}, "only 60 samples"),
        ({"val_samples": 60}, "leaves nothing to train on"),
        ({"seed": -1}, "seed=-1"),
        ({"shard_samples": 0}, "shard_samples=0"),
        ({"reencode": "gif"}, "reencode=gif"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"on_error": "ignore"}, "on_error=ignore"),
        ({"workers": 0}, "workers=0"),
        ({"kind": "llama"}, "kind=llama"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _prepare(source, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/*.tar")) and not (tmp_path / "out" / "manifest.json").exists()
    _prepare(source, tmp_path / "out")  # and the mistake leaves nothing that is in the way


def test_random_orders_use_every_sample_as_often_as_asked_and_never_in_both_splits(tmp_path):
    from data_prep.prepare.blend import Source

    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 40, rng.integers(1, 4)).tolist()
        sources = [Source(tmp_path, "llava", str(n), samples=int(rng.integers(1, 80))) for n in range(len(sizes))]
        total, unique = sum(source.samples or 0 for source in sources), 0
        options = Options(val_samples=0, seed=int(rng.integers(100)), shuffle=bool(rng.integers(2)))
        everything = draw_order(sources, sizes, options)["train"]
        assert len(everything) == total
        counts = np.bincount(everything, minlength=sum(sizes))
        start = 0
        for source, size in zip(sources, sizes, strict=True):
            own = counts[start : start + size]
            assert own.sum() == source.samples and own.max() - own.min() <= 1
            unique, start = unique + int((own > 0).sum()), start + size
        val_samples = int(rng.integers(0, unique))
        order = draw_order(sources, sizes, Options(val_samples=val_samples, seed=options.seed))
        assert len(set(order["val"])) == len(order["val"]) == val_samples
        assert not set(order["val"]) & set(order["train"])
