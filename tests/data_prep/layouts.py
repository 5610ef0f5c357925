"""Small datasets in the layout in which the public ones are downloaded."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, format: str = "JPEG", size: tuple[int, int] = (40, 32)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def llava_pretrain(folder: Path, count: int = 60) -> Path:
    """blip_laion_cc_sbu_558k.json, its companion, and the unpacked images.zip."""
    records = []
    for number in range(count):
        name = f"{number % 3:05d}/{number:09d}.jpg"
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(picture(number))
        caption = f"a picture, number {number} – naïve 日本"
        records.append(
            {"id": f"{number:09d}", "image": name, "conversations": turns("Describe it.\n<image>", caption)}
        )
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records, ensure_ascii=False))
    (folder / "blip_laion_cc_sbu_558k_meta.json").write_text("[]")
    return folder


def llava_instruct(folder: Path, count: int = 20) -> Path:
    """llava_v1_5_mix665k.json beside coco and the others: several turns, and every fourth sample without an image."""
    records: list[dict[str, Any]] = []
    (folder / "coco" / "train2017").mkdir(parents=True)
    for number in range(count):
        record: dict[str, Any] = {"id": str(number)}
        if number % 4:
            record["image"] = f"coco/train2017/{number:012d}.jpg"
            (folder / record["image"]).write_bytes(picture(1000 + number))
        tag = "<image>\n" if number % 4 else ""
        record["conversations"] = turns(f"{tag}What is {number}?", "A number.") + turns("And then?", str(number + 1))
        records.append(record)
    file = folder / "llava_v1_5_mix665k.json"
    file.write_text(json.dumps(records, indent=2))
    return file


def llava_jsonl(file: Path, lines: list[Any]) -> Path:
    """Lines that are no text are written as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n")
    return file


def llava_onevision(folder: Path, count: int = 30) -> Path:
    """Two subsets in folders; features as in the dataset card; the last rows of each have no image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn_type = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    schema = pa.schema(
        [("id", pa.string()), ("image", image_type), ("conversations", turn_type), ("data_source", pa.string())]
    )
    for part, subset in enumerate(("ai2d(cauldron,llava_format)", "mathqa")):
        rows = []
        for number in range(count // 2):
            pictured = number < count // 2 - 2
            content = picture(2000 + 100 * part + number, "PNG" if number % 2 else "JPEG")
            rows.append(
                {
                    "id": f"{subset}_{number}",
                    "image": {"bytes": content, "path": f"{number}.png"} if pictured else None,
                    "conversations": turns(("<image>\n" if pictured else "") + "Which?", f"{subset} {number}"),
                    "data_source": subset,
                }
            )
        (folder / subset).mkdir(parents=True)
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, folder / subset / "train-00000-of-00001.parquet", row_group_size=4)
    return folder


def finevision(folder: Path, count: int = 24) -> Path:
    """One subset in a folder: 0, 1 or 2 images in a row, texts without image tags, and ratings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "images": [
                {"bytes": picture(3000 + 2 * number + which, "PNG"), "path": None} for which in range(number % 3)
            ],
            "texts": [
                {"user": f"Question {number}?", "assistant": f"Answer {number}."},
                {"user": "Sure?", "assistant": "Yes."},
            ],
            "source": "demo",
            "relevance_ratings": [5, 4],
            "relevance_min": 4,
        }
        for number in range(count)
    ]
    image_type = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    text_type = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))
    schema = pa.schema(
        [
            ("images", image_type),
            ("texts", text_type),
            ("source", pa.string()),
            ("relevance_ratings", pa.list_(pa.int64())),
            ("relevance_min", pa.int64()),
        ]
    )
    (folder / "demo").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema), folder / "demo" / "train-00000-of-00001.parquet", row_group_size=5
    )
    return folder


def coco_stuff(folder: Path, count: int = 8) -> Path:
    """train2017 and val2017 beside the unpacked stuffthingmaps_trainval2017.zip."""
    for number in range(count):
        split = "val2017" if number % 4 == 0 else "train2017"
        for kind in (folder / split, folder / "stuffthingmaps_trainval2017" / split):
            kind.mkdir(parents=True, exist_ok=True)
        (folder / split / f"{number:012d}.jpg").write_bytes(picture(4000 + number))
        labels = np.random.default_rng(number).integers(0, 182, (32, 40), dtype=np.uint8)
        Image.fromarray(labels).save(folder / "stuffthingmaps_trainval2017" / split / f"{number:012d}.png")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` and its content."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def stored(out: Path, split: str = "train") -> dict[str, dict[str, bytes]]:
    """The members of every sample, by key, as plain tar and the index hold them alike."""
    import tarfile

    samples: dict[str, dict[str, bytes]] = {}
    for file in sorted(out.glob(f"{split}-*.tar")):
        index = json.loads(file.with_suffix(".index.json").read_text())
        content = file.read_bytes()
        with tarfile.open(file) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for entry in index:
            for extension, (offset, size) in entry["members"].items():
                assert members.pop(f"{entry['key']}.{extension}") == content[offset : offset + size]
                samples.setdefault(entry["key"], {})[extension] = content[offset : offset + size]
        assert not members
    return samples


def records(out: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(members["json"]) for members in stored(out, split).values()]
