"""What is asked about a scene of named pictures, in plain English, and the right answer.

A sample is a conversation of two turns. The first turn's type is drawn first and the scene is made to suit it, so that
the types come in fixed shares; the second turn asks something else that the scene can answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np

from data_prep.emoji.pictures import Gallery
from data_prep.emoji.scene import MAX_PICTURES, PlacedPicture, Scene, draw_scene
from data_prep.emoji.splits import Cast
from data_prep.generated import Turn

SHARES = {
    "name": 0.15,
    "place": 0.15,
    "count": 0.1,
    "exists": 0.1,
    "larger": 0.1,
    "colour": 0.1,
    "category": 0.1,
    "read": 0.1,
    "caption": 0.05,
    "text": 0.05,
}
LAYOUTS = {  # that a first question's scene may have, each as often; others can be asked in any
    "name": ("single",),
    "place": ("scattered",),
    "count": ("scattered", "scattered", "row"),
    "exists": ("scattered", "scattered", "row"),
    "larger": ("scattered",),
    "colour": ("single", "scattered"),
    "category": ("single", "scattered"),
    "read": ("row",),
    "caption": ("single", "scattered", "row"),
}
FEWEST = {"larger": 2, "read": 2}  # pictures
WORDING = {
    "name": ("What is this?", "What does the picture show?"),
    "place": ("What is at the {place}?", "What do you see at the {place}?"),
    "count": ("How many pictures are there?", "How many things do you see?"),
    "count_category": ("How many of them are {category}?",),
    "exists": ("Is there {a}?", "Do you see {a}?"),
    "larger": ("Which is larger, {a} or {b}?",),
    "colour": ("What colour is it mostly?",),
    "colour_of": ("What colour is the {name} mostly?",),
    "category": ("What kind of thing is this?",),
    "category_of": ("What kind of thing is at the {place}?",),
    "read": ("Name them from left to right.", "What does the row show, from left to right?"),
    "caption": ("Describe the picture.", "What does the picture show, and where?"),
    "text": ("What kind of thing is {a}?",),
}
TRIES = 1000  # scenes drawn for a question before one says that none suits it

_ENDS_ITS_HEAD = re.compile(r" (?:with|without|in|on|of|over|from|at|behind|showing|holding|blowing|and|to)\b.*")
_SINGULAR_S = ("ss", "us", "is", "os")
_SOUNDS_LIKE_A_CONSONANT = ("uni", "uku", "one", "eu", "ewe", "us")
_SILENT_H = ("hour", "honest")


def draw_sample(
    rng: np.random.Generator,
    gallery: Gallery,
    cast: Cast,
    size: int,
    singles: bool,
    kinds: Sequence[str],
) -> tuple[Scene | None, list[Turn]]:
    """A scene (None for a text-only sample) and the two turns asked about it; one, where ``kinds`` have no second.

    Args:
        singles: every scene is of one picture.
        kinds: the types of question that are asked, of :func:`chosen_kinds`.

    Raises:
        ValueError: the cast can play no scene that suits the question drawn.
    """
    shares = {kind: share for kind, share in SHARES.items() if kind in kinds and _possible(kind, cast)}
    weights = np.array(list(shares.values()))
    first = str(rng.choice(list(shares), p=weights / weights.sum()))
    if first == "text":
        return None, [_ask_text(rng, gallery, cast), _ask_text(rng, gallery, cast)]
    for _ in range(TRIES):
        scene = _scene_for(rng, gallery, cast, size, first, singles)
        if _fits(first, scene):
            others = [kind for kind in shares if kind not in (first, "text") and _fits(kind, scene)]
            asked = [first, others[int(rng.integers(len(others)))]] if others else [first]
            return scene, [_ask(rng, kind, scene, gallery, cast) for kind in asked]
    raise ValueError(
        f"no scene of {len(cast.concepts)} concepts suits a question of type {first}: give other packages"
    )


def chosen_kinds(names: str | None, singles: bool) -> tuple[str, ...]:
    """The types of question that ``names`` lists, in the order of ``SHARES``; all that can be asked for None.

    Args:
        singles: every scene is of one picture.

    Raises:
        ValueError: there is no such type, it is not asked of single pictures, or a split would have nothing to ask:
            that of pairs of concept and place has scattered pictures alone.
    """
    can = [kind for kind in SHARES if kind == "text" or not singles or "single" in LAYOUTS[kind]]
    if names is None:
        return tuple(can)
    wanted = [name.strip() for name in names.split(",")]
    if wrong := [name for name in wanted if name not in can]:
        of = " of single pictures" if singles else ""
        raise ValueError(f"questions={names}: {', '.join(wrong)} is not asked{of}; give some of {','.join(can)}")
    if not any(("single" if singles else "scattered") in LAYOUTS.get(kind, ()) for kind in wanted):
        scattered = [kind for kind, layouts in LAYOUTS.items() if "scattered" in layouts]
        needed = "a type that asks for a picture" if singles else f"one of {','.join(scattered)}"
        raise ValueError(f"questions={names}: give {needed}, too, so that every split has something to ask")
    return tuple(kind for kind in can if kind in wanted)


def _possible(kind: str, cast: Cast) -> bool:
    return kind == "text" or not cast.outer_places or "scattered" in LAYOUTS[kind]


def _scene_for(rng: np.random.Generator, gallery: Gallery, cast: Cast, size: int, kind: str, singles: bool) -> Scene:
    only = {"single"} if singles else {"scattered"} if cast.outer_places else set(MAX_PICTURES)
    layouts = [layout for layout in LAYOUTS[kind] if layout in only]
    layout = layouts[int(rng.integers(len(layouts)))]
    fewest = max(FEWEST.get(kind, 1), 2 if layout == "row" else 1)
    number = int(rng.integers(fewest, MAX_PICTURES[layout] + 1))
    return draw_scene(rng, gallery, cast, layout, number, size)


def _fits(kind: str, scene: Scene) -> bool:
    if kind == "larger":
        return bool(_comparable(scene))
    if kind == "colour":
        return any(placed.colour for placed in scene.pictures)
    if kind == "count":
        return scene.layout != "single"
    return scene.layout in LAYOUTS[kind] or kind == "exists"


def _comparable(scene: Scene) -> list[tuple[PlacedPicture, PlacedPicture]]:
    """Pairs of pictures, the first clearly larger than the second."""
    return [(a, b) for a, b in permutations(scene.pictures, 2) if a.is_clearly_larger(b)]


def _ask(rng: np.random.Generator, kind: str, scene: Scene, gallery: Gallery, cast: Cast) -> Turn:
    question, answer = _ASKING[kind](rng, scene, gallery, cast)
    return kind, question, answer


def _one_of(rng: np.random.Generator, pictures: Sequence[PlacedPicture]) -> PlacedPicture:
    return pictures[int(rng.integers(len(pictures)))]


def _name(rng: np.random.Generator, scene: Scene, gallery: Gallery, cast: Cast) -> tuple[str, str]:
    return _word(rng, "name"), scene.pictures[0].concept.name


def _place(rng: np.random.Generator, scene: Scene, gallery: Gallery, cast: Cast) -> tuple[str, str]:
    placed = _one_of(rng, scene.pictures)
    return _word(rng, "place", place=placed.place_name), placed.concept.name


def _count(rng: np.random.Generator, scene: Scene, gallery: Gallery, cast: Cast) -> tuple[str, str]:
    """Every other time of a category, which one of two times is that of a picture."""
    if rng.random() < 0.5:
        return _word(rng, "count"), str(len(scene.pictures))
    categories = sorted({gallery.concepts[concept].category for concept in cast.concepts})
    any_of_all = categories[int(rng.integers(len(categories)))]
    of_a_picture = _one_of(rng, scene.pictures).concept.category
    category = of_a_picture if rng.random() < 0.5 else any_of_all
    number = sum(placed.concept.category == category for placed in scene.pictures)
    return _word(rng, "count_category", category=category), str(number)


def _exists(rng: np.random.Generator, scene: Scene, gallery: Gallery, cast: Cast) -> tuple[str, str]:
    shown = {placed.concept.name for placed in scene.pictures}
    if rng.random() < 0.5:
        return _word(rng, "exists", a=with_article(_one_of(rng, scene.pictures).concept.name)), "yes"
    while (name := gallery.concepts[cast.concepts[int(rng.integers(len(cast.concepts)))]].name) in shown:
        pass
    return _word(rng, "exists", a=with_article(name)), "no"


def _larger(rng: np.random.Generator, scene: Scene, gallery: Gallery, cast: Cast) -> tuple[str, str]:
    pairs = _comparable(scene)
    larger, smaller = (placed.concept.name for placed in pairs[int(rng.integers(len(pairs)))])
    a, b = (larger, smaller) if rng.random() < 0.5 else (smaller, larger)
    return _word(rng, "larger", a=f"the {a}", b=f"the {b}"), larger


def _colour(rng: np.random.Generator, scene: Scene, gallery: Gallery, cast: Cast) -> tuple[str, str]:
    placed = _one_of(rng, [placed for placed in scene.pictures if placed.colour])
    assert placed.colour is not None
    if scene.layout == "single":
        return _word(rng, "colour"), placed.colour
    return _word(rng, "colour_of", name=placed.concept.name), placed.colour


def _category(rng: np.random.Generator, scene: Scene, gallery: Gallery, cast: Cast) -> tuple[str, str]:
    placed = _one_of(rng, scene.pictures)
    if scene.layout == "single":
        return _word(rng, "category"), placed.concept.category
    return _word(rng, "category_of", place=placed.place_name), placed.concept.category


def _read(rng: np.random.Generator, scene: Scene, gallery: Gallery, cast: Cast) -> tuple[str, str]:
    return _word(rng, "read"), ", ".join(placed.concept.name for placed in scene.pictures)


def _caption(rng: np.random.Generator, scene: Scene, gallery: Gallery, cast: Cast) -> tuple[str, str]:
    """Pictures in reading order, each with its place unless they stand in a row."""
    in_order = scene.pictures if scene.layout == "row" else sorted(scene.pictures, key=lambda placed: placed.place)
    parts = [with_article(placed.concept.name) for placed in in_order]
    if scene.layout == "scattered":
        parts = [f"{part} at the {placed.place_name}" for part, placed in zip(parts, in_order, strict=True)]
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    sentence = f"{listed} in a row." if scene.layout == "row" else f"{listed}."
    return _word(rng, "caption"), sentence[0].upper() + sentence[1:]


_ASKING: dict[str, Callable[[np.random.Generator, Scene, Gallery, Cast], tuple[str, str]]] = {
    "name": _name,
    "place": _place,
    "count": _count,
    "exists": _exists,
    "larger": _larger,
    "colour": _colour,
    "category": _category,
    "read": _read,
    "caption": _caption,
}


def _ask_text(rng: np.random.Generator, gallery: Gallery, cast: Cast) -> Turn:
    """A question without an image, so that the text-only path sees real samples."""
    concept = gallery.concepts[cast.concepts[int(rng.integers(len(cast.concepts)))]]
    return "text", _word(rng, "text", a=with_article(concept.name)), concept.category


def _word(rng: np.random.Generator, form: str, **names: str) -> str:
    wordings = WORDING[form]
    return wordings[int(rng.integers(len(wordings)))].format(**names)


def with_article(name: str) -> str:
    """``a dog``, ``an owl``, ``french fries``: by spelling, so that what cannot be counted has an article too."""
    head = _ENDS_ITS_HEAD.sub("", name).split(" ")[-1]
    if head.endswith("s") and not head.endswith(_SINGULAR_S):
        return name
    first = name.lower()
    vowel = first.startswith(_SILENT_H) or (
        first.startswith(tuple("aeiou")) and not first.startswith(_SOUNDS_LIKE_A_CONSONANT)
    )
    return f"{'an' if vowel or first.startswith('x-') else 'a'} {name}"
