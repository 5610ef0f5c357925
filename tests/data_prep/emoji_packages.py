"""Made-up packages of emoji, in the formats of the real ones: simple figures, each of one colour, with names."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 20, 20), "green": (20, 160, 40), "blue": (30, 60, 220), "yellow": (250, 220, 30)}
FIGURES = ("disc", "oblong", "owl", "bus", "arch", "glasses", "hour glass")
THINGS = [(f"{colour} {figure}", colour, figure) for figure in FIGURES for colour in COLOURS]  # 28
CATEGORIES = ("Food & Drink", "Objects", "Animals & Nature")

STYLES = {"google": "emoji-datasource-google", "twitter": "emoji-datasource-twitter"}


def write_all(folder: Path) -> Path:
    """Three packages without SVG: an archive, a folder, and a folder with ``package`` in it."""
    folder.mkdir(exist_ok=True)
    write_archive(folder / "emoji-datasource-google-16.0.0.tgz", datasource("google"))
    write_folder(folder / "twitter", datasource("twitter"))
    write_folder(folder / "fluent" / "package", fluent())
    return folder


def datasource(style: str) -> dict[str, bytes]:
    entries = [*map(_entry, range(len(THINGS))), *_others()]
    return {
        "package.json": _json({"name": f"emoji-datasource-{style}", "version": "16.0.0"}),
        "emoji.json": _json(entries),
        f"img/{style}/sheets/64.png": b"not read",
        **{f"img/{style}/64/{codes(number)}.png": _picture(number, 64, "PNG") for number in range(len(THINGS))},
        f"img/{style}/64/1f1e6.png": _picture(0, 64, "PNG"),
    }


def fluent() -> dict[str, bytes]:
    return {
        "package.json": _json({"name": "@lobehub/fluent-emoji-3d", "version": "1.1.0"}),
        **{f"assets/{codes(number)}-fe0f.webp": _picture(number, 96, "WEBP") for number in range(len(THINGS))},
    }


def openmoji() -> dict[str, bytes]:
    """Its annotations say ``small`` before every name."""
    entries = [
        {"hexcode": codes(number).upper(), "annotation": f"small {name}"} for number, (name, _, _) in enumerate(THINGS)
    ]
    return {
        "package.json": _json({"name": "openmoji", "version": "17.0.0"}),
        "data/openmoji.json": _json(entries),
        **{f"color/svg/{codes(number).upper()}.svg": _svg(number) for number in range(len(THINGS))},
    }


def codes(number: int) -> str:
    return f"1f4{number:02x}"


def write_archive(file: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _entry(number: int) -> dict[str, Any]:
    category = CATEGORIES[number % len(CATEGORIES)]
    return {
        "unified": f"{codes(number).upper()}-FE0F",
        "name": THINGS[number][0].upper(),
        "category": category,
        "subcategory": category.split()[0].lower(),
    }


def _others() -> list[dict[str, Any]]:
    """One of each kind that is left out."""
    left_out = (
        ("1F1E6", "A FLAG", "Flags", "country-flag"),
        ("1F468-200D-1F33E", "MAN FARMER", "People & Body", "person-role"),
        ("1F3C4-200D-2640-FE0F", "WOMAN SURFING", "People & Body", "person-sport"),
        ("1F550", "CLOCK FACE ONE OCLOCK", "Travel & Places", "time"),
        ("1F999", "LLAMA", "Animals & Nature", "animal-mammal"),
    )
    return [dict(zip(("unified", "name", "category", "subcategory"), entry, strict=True)) for entry in left_out]


def _picture(number: int, side: int, form: str) -> bytes:
    """A figure of its colour, of a width and height of its own, on a transparent ground."""
    _, colour, figure = THINGS[number]
    picture = Image.new("RGBA", (side, side))
    kind = FIGURES.index(figure)
    box = (side // 8, side // 8, side * (7 + kind) // 14, side * (13 - kind) // 14)
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if kind % 2 else pen.rectangle)(box, fill=(*COLOURS[colour], 255))
    content = io.BytesIO()
    picture.save(content, form, **({"lossless": True} if form == "WEBP" else {}))
    return content.getvalue()


def _svg(number: int) -> bytes:
    colour = "#{:02x}{:02x}{:02x}".format(*COLOURS[THINGS[number][1]])
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
        f'<rect x="9" y="18" width="54" height="36" fill="{colour}"/></svg>'
    ).encode()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
