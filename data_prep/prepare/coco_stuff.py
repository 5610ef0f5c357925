"""COCO-Stuff: images with pixel maps, for diagnostics that need to know what a patch shows.

https://github.com/nightrome/cocostuff: ``train2017.zip`` and ``val2017.zip`` hold ``SPLIT/NUMBER.jpg``, and
``stuffthingmaps_trainval2017.zip`` holds ``SPLIT/NUMBER.png``, whose grey values are the labels (255: unlabeled).
The images may lie in SOURCE or SOURCE/images, the pixel maps in SOURCE/stuffthingmaps_trainval2017, SOURCE/pixelmaps
or SOURCE/annotations; other places are given by ``images`` and ``masks``. A sample is one question that is only the
image, without an answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.prepare.candidate import BadSample, Candidate, read_inside

MASK_FOLDERS = ("stuffthingmaps_trainval2017", "pixelmaps", "annotations")


@dataclass(frozen=True)
class CocoStuff:
    images: Path
    masks: Path
    names: tuple[str, ...]  # of the pixel maps, relative to their folder and without .png

    @classmethod
    def open(cls, path: Path, images: Path | None, masks: Path | None) -> CocoStuff:
        masks = masks or mask_folder(path)
        if masks is None or not masks.is_dir():
            raise ValueError(f"{path} has none of the folders {', '.join(MASK_FOLDERS)}: give masks=FOLDER")
        images = images or (path / "images" if (path / "images").is_dir() else path)
        names = sorted(file.relative_to(masks).as_posix()[: -len(".png")] for file in masks.rglob("*.png"))
        return cls(images, masks, tuple(names))

    @property
    def rows(self) -> int:
        return len(self.names)

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name} {(self.masks / f'{name}.png').stat().st_size}\n".encode())
        return {"sha256": digest.hexdigest()}

    def origin(self, row: int) -> str:
        return self.names[row]

    def read(self, row: int) -> Candidate:
        image = f"{self.names[row]}.jpg"
        return Candidate(
            id=self.names[row],
            conversations=[{"from": "human", "value": "<image>"}],
            images=[image],
            load=lambda number: read_inside(self.images, image),
            mask=lambda: self._mask(row),
            answered=False,
        )

    def _mask(self, row: int) -> bytes:
        try:
            return read_inside(self.masks, f"{self.names[row]}.png")
        except BadSample as error:
            raise BadSample("bad_mask", error.detail) from error


def mask_folder(path: Path) -> Path | None:
    return next((path / folder for folder in MASK_FOLDERS if (path / folder).is_dir()), None)
