"""The small language of the demo: what is asked about a scene, in which words, and the right answer.

A sample is a conversation of two turns. The first turn's type is drawn first and the scene is made to suit it,
so that the types come in fixed shares; the second turn asks something else that the scene can answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from data_prep.digits.scans import Scans
from data_prep.digits.scene import MAX_DIGITS, MAX_ROW, PlacedDigit, Scene, draw_scene
from data_prep.generated import Turn
from nemo_pre.data.conversation import TEMPLATES

SHARES = {"count": 0.15, "place": 0.3, "exists": 0.15, "read": 0.25, "larger": 0.1, "text": 0.05}
SECOND_SHARES = {"count": 1, "place": 2, "exists": 1, "read": 2}  # relative; of those that the scene can answer
TYPES = tuple(SHARES)
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
WORDING = {
    "count": ("how many digits are there?", "count the digits."),
    "place": ("which digit is at the {place}?", "what is at the {place}?"),
    "exists": ("is there a {a}?", "do you see a {a}?"),
    "read": ("read left to right.", "what does the row say?"),
    "larger": ("which is larger, the {a} or the {b}?",),
    "after": ("what comes after {a}?",),
    "before": ("what comes before {a}?",),
    "plus": ("what is {a} plus {b}?",),
    "greater": ("which number is greater, {a} or {b}?",),
}
CLEARLY_LARGER = 3  # pixels of height by which two digits must differ to be compared


def draw_sample(rng: np.random.Generator, scans: Scans, split: str) -> tuple[Scene | None, list[Turn]]:
    """A scene (None for a text-only sample) and the two turns asked about it."""
    first = str(rng.choice(TYPES, p=list(SHARES.values())))
    if first == "text":
        return None, [_ask_text(rng), _ask_text(rng)]
    scene = _scene_for(rng, scans, split, first)
    weights = np.array([share * _fits(kind, scene, first) for kind, share in SECOND_SHARES.items()], float)
    second = str(rng.choice(list(SECOND_SHARES), p=weights / weights.sum()))
    return scene, [_ask(rng, first, scene), _ask(rng, second, scene)]


def _scene_for(rng: np.random.Generator, scans: Scans, split: str, kind: str) -> Scene:
    in_row = kind == "read" or (kind in ("count", "exists") and rng.random() < 0.25)
    layout = "row" if in_row else "scattered"
    numbers = np.arange(2 if kind == "larger" else 1, (MAX_ROW if in_row else MAX_DIGITS) + 1)
    # Counting needs every number equally often; for the rest, scenes of few digits are what a small model first
    # learns to tell the digits apart from.
    shares = np.ones(len(numbers)) if kind == "count" else 1.0 / numbers
    while True:
        num_digits = int(rng.choice(numbers, p=shares / shares.sum()))
        scene = draw_scene(rng, scans, split, layout, num_digits)
        if kind != "larger" or _comparable(scene):
            return scene


def _fits(kind: str, scene: Scene, first: str) -> bool:
    layout_needed = {"place": "scattered", "read": "row"}.get(kind, scene.layout)
    return kind != first and scene.layout == layout_needed


def _comparable(scene: Scene) -> list[tuple[PlacedDigit, PlacedDigit]]:
    """Pairs of digits that occur once each, the first clearly larger than the second."""
    labels = [placed.digit for placed in scene.digits]
    unique = [placed for placed in scene.digits if labels.count(placed.digit) == 1]
    return [(a, b) for a, b in product(unique, unique) if a.height >= b.height + CLEARLY_LARGER]


def _ask(rng: np.random.Generator, kind: str, scene: Scene) -> Turn:
    labels = [placed.digit for placed in scene.digits]
    if kind == "count":
        return kind, _word(rng, kind), str(len(labels))
    if kind == "place":
        chosen = scene.digits[int(rng.integers(len(labels)))]
        row, column = chosen.cell
        return kind, _word(rng, kind, place=PLACES[row][column]), str(chosen.digit)
    if kind == "exists":
        yes = rng.random() < 0.5
        candidates = [digit for digit in range(10) if (digit in labels) == yes]
        return kind, _word(rng, kind, a=rng.choice(candidates)), "yes" if yes else "no"
    if kind == "read":
        in_order = sorted(scene.digits, key=lambda placed: placed.left)
        return kind, _word(rng, kind), " ".join(str(placed.digit) for placed in in_order)
    assert kind == "larger", kind
    pairs = _comparable(scene)
    larger, smaller = pairs[int(rng.integers(len(pairs)))]
    named = (larger, smaller) if rng.random() < 0.5 else (smaller, larger)
    return kind, _word(rng, kind, a=named[0].digit, b=named[1].digit), str(larger.digit)


def _ask_text(rng: np.random.Generator) -> Turn:
    """A question without an image, so that the text-only path sees real samples."""
    form = str(rng.choice(["after", "before", "plus", "greater"]))
    if form == "after":
        a = int(rng.integers(0, 9))
        return "text", _word(rng, form, a=a), str(a + 1)
    if form == "before":
        a = int(rng.integers(1, 10))
        return "text", _word(rng, form, a=a), str(a - 1)
    if form == "plus":
        total = int(rng.integers(0, 10))
        a = int(rng.integers(0, total + 1))
        return "text", _word(rng, form, a=a, b=total - a), str(total)
    a, b = (int(v) for v in rng.choice(10, size=2, replace=False))
    return "text", _word(rng, form, a=a, b=b), str(max(a, b))


def _word(rng: np.random.Generator, form: str, **names: object) -> str:
    wordings = WORDING[form]
    return wordings[int(rng.integers(len(wordings)))].format(**names)


TEMPLATES_KNOWN = ("plain", "vicuna_v1", "caption")  # with more words the tokenizer would be another one


def corpus() -> Iterator[str]:
    """Every sentence a sample may hold, chat templates included: what the tokenizer is trained on."""
    places = [place for row in PLACES for place in row]
    for wordings in WORDING.values():
        for wording, place, digit in product(wordings, places, range(10)):
            yield wording.format(place=place, a=digit, b=digit)
    yield from ("yes", "no")
    for name in TEMPLATES_KNOWN:
        template = TEMPLATES[name]
        yield template.system + template.before_question + template.before_answer
