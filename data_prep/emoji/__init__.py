"""Scenes of named pictures in several drawing styles, composed of packages of emoji that the user has fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pre.options import Count, PathText, Seed


def prepare(
    packages: Sequence[PathText],
    out: PathText | Path,
    num_scenes: Count = 20_000,
    seed: Seed = 0,
    image_size: Count = 112,
    singles: bool = False,
    held_out_style: str | None = "openmoji",
    held_out_concepts: float = 0.1,
    val_fraction: float = 0.05,
    num_concepts: Count | None = None,
    questions: str | None = None,
    scenes_per_shard: Count = 500,
    workers: Count | None = None,
    sheet: PathText | None = None,
) -> dict[str, Any]:
    """Writes the emoji dataset into ``out`` and returns the manifest.

    ``packages`` are archives that npm pack leaves, folders of packages, or folders of either: emoji-datasource-google
    and -twitter, @lobehub/fluent-emoji-3d, openmoji. Pictures and names keep the licences of their packages
    (docs/emoji.md).

    A scene shows 1 to 5 pictures on ``image_size`` pixels square, or always one with ``singles``. Training shows
    neither ``held_out_style`` (null: none is held out) nor ``held_out_concepts`` of the concepts nor certain places of
    each; the splits val_style, val_concept and val_pair do, and val shows what training may. Each has ``val_fraction``
    of the scenes. ``sheet`` names a PNG for a look at the first of them.

    ``num_concepts`` (drawn by the seed; null: all) and ``questions`` (types, name,colour; null: all) make a smaller
    task, which less training learns.

    The bytes written depend on every option but ``workers`` (processes; None: one per core) and ``sheet``. Data that
    is already complete is left as it is; what is missing or cut of it is written again.

    Raises:
        ValueError: an option is out of range, a package is missing or damaged, or ``out`` holds something else.
    """
    from data_prep.emoji.build import Parameters, build
    from data_prep.emoji.packages import read_packages
    from data_prep.emoji.sheet import check_sheet, write_sheet

    if not packages:
        raise ValueError("packages is empty: name the fetched packages, or their folder")
    given = Parameters(
        num_scenes,
        seed,
        image_size,
        singles,
        held_out_style,
        held_out_concepts,
        val_fraction,
        num_concepts,
        questions,
        scenes_per_shard,
    )
    if sheet is not None:
        check_sheet(sheet)
    manifest = build(Path(out), given, read_packages(packages), workers)
    if sheet is not None:
        write_sheet(Path(out), Path(sheet))
    return manifest
