"""Concepts: what every given style draws, and has a name that a reader of English would say.

Left out, and counted: flags, signs and skin tones (categories that are not things); variants of another concept by
gender, profession or family, whose pictures differ in a detail; the twenty-four clock faces; and whatever a style
lacks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.emoji.packages import Package, code

NOT_THINGS = ("Flags", "Symbols", "Component")
VARIANT = re.compile(r".*-200d-264[02](-.*)?|1f46[89]-200d-.*")  # by gender, or a man or woman joined to something
FEWEST = 20


@dataclass(frozen=True)
class Concept:
    """``code``: its code points; ``category`` and ``subcategory``: as the metadata have them, in small letters."""

    code: str
    name: str
    category: str
    subcategory: str


def shared_concepts(packages: Sequence[Package]) -> tuple[list[Concept], dict[str, int], str]:
    """The concepts of all ``packages``, in Unicode's order; how many entries were left out, by reason; and where the
    names are from: OpenMoji's annotations where that package is given, else ``emoji.json``.

    Raises:
        ValueError: no package has ``emoji.json``, or one has it damaged, or too few concepts are shared.
    """
    about = next((package for package in packages if "emoji.json" in package.files), None)
    if about is None:
        raise ValueError("no package has emoji.json, the names and categories: give emoji-datasource-google too")
    annotated = next((package for package in packages if "data/openmoji.json" in package.files), None)
    annotations = _annotations(annotated) if annotated is not None else {}
    left_out: Counter[str] = Counter()
    concepts: dict[str, Concept] = {}
    for entry in _entries(about, "emoji.json", ("unified", "name", "category", "subcategory")):
        codes = code(entry["unified"])
        name = annotations.get(codes, entry["name"].lower()).replace("’", "'")
        reason = _reason(packages, codes, name, entry)
        if reason is None and name in concepts:
            reason = "of another's name"
        if reason is not None:
            left_out[reason] += 1
            continue
        concepts[name] = Concept(codes, name, _in_words(entry["category"]), entry["subcategory"])
    if len(concepts) < FEWEST:
        raise ValueError(
            f"{', '.join(p.name for p in packages)} share {len(concepts)} concepts (left out: {dict(left_out)}) and "
            f"scenes need {FEWEST}: give other packages"
        )
    names_from = f"{annotated.name} annotations" if annotated is not None else f"{about.name} emoji.json"
    return list(concepts.values()), dict(sorted(left_out.items())), names_from


def some_of(concepts: list[Concept], number: int | None, seed: int) -> list[Concept]:
    """``number`` of the concepts, drawn by ``seed``, in their order; all of them for None.

    Raises:
        ValueError: there are fewer.
    """
    if number is None:
        return concepts
    if number > len(concepts):
        raise ValueError(f"num_concepts={number}: the packages share {len(concepts)}; give at most these, or null")
    drawn = np.random.default_rng([seed, 2]).permutation(len(concepts))[:number]
    return [concepts[place] for place in sorted(drawn.tolist())]


def _reason(packages: Sequence[Package], codes: str, name: str, entry: dict[str, Any]) -> str | None:
    if entry["category"] in NOT_THINGS:
        return f"category {entry['category']}"
    if VARIANT.fullmatch(codes) or entry["subcategory"] == "family" or ":" in name or "," in name:
        return "variant of another concept"
    if entry["name"].lower().startswith("clock face"):
        return "clock face"
    lacking = [package.style for package in packages if codes not in package.pictures]
    return f"not in {' and '.join(lacking)}" if lacking else None


def _annotations(package: Package) -> dict[str, str]:
    entries = _entries(package, "data/openmoji.json", ("hexcode", "annotation"))
    return {code(entry["hexcode"]): entry["annotation"] for entry in entries}


def _entries(package: Package, file: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    entries = package.json(file)
    if not isinstance(entries, list):
        raise ValueError(f"{package.path}: {file} is not a list of emoji; fetch the package again")
    for number, entry in enumerate(entries):
        lacking = [name for name in fields if not isinstance(entry, dict) or not isinstance(entry.get(name), str)]
        if lacking:
            raise ValueError(f"{package.path}: entry {number} of {file} has no text in {' and '.join(lacking)}")
    return entries


def _in_words(category: str) -> str:
    """``Food & Drink`` as an answer says it."""
    return category.lower().replace("&", "and")
