"""A contact sheet: the first scenes of the validation split side by side, each above its first question and answer."""

from __future__ import annotations

import io
import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nemo_pre.data.conversation import IMAGE_TAG
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.shards import ShardedSamples

COLUMNS, ROWS = 6, 4
MARGIN, LINES, LINE = 8, 4, 12  # pixels; lines of text below a scene


def check_sheet(path: str | Path) -> None:
    """Raises a ValueError where the sheet cannot be written, before there is anything to show."""
    file = Path(path)
    if file.suffix.lower() != ".png":
        raise ValueError(f"sheet={file}: name a file that ends in .png")
    if file.is_dir() or not file.absolute().parent.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise ValueError(f"sheet={file}: its folder does not exist or cannot be written to; name another")


def write_sheet(out: Path, file: Path) -> None:
    """Writes the sheet of the prepared directory ``out``."""
    samples = ShardedSamples(read_manifest(out, "out").shards["val"])
    shown = [raw for raw in map(samples.read, range(len(samples))) if raw.image is not None][: COLUMNS * ROWS]
    pictures = [Image.open(io.BytesIO(raw.images[0])).convert("RGB") for raw in shown]
    side = max(picture.width for picture in pictures)
    width, height = side + MARGIN, side + MARGIN + LINES * LINE
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, -(-len(shown) // COLUMNS) * height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=LINE - 2)
    for index, (raw, picture) in enumerate(zip(shown, pictures, strict=True)):
        x, y = MARGIN + index % COLUMNS * width, MARGIN + index // COLUMNS * height
        sheet.paste(picture, (x, y))
        question, answer = (turn["value"].replace(IMAGE_TAG, "").strip() for turn in raw.record["conversations"][:2])
        lines = textwrap.wrap(f"{question} {answer}", max(8, side // 5))[:LINES]
        for number, line in enumerate(lines):
            pen.text((x, y + side + 1 + number * LINE), line, fill="black", font=font)
    sheet.save(file, "PNG", optimize=True)
