"""What each split shows: by concept, by style, and by pairs of concept and place.

Training sees neither the held-out style, nor the held-out concepts, nor a concept at the two outer places that are
held out for it. Each of these has a split of its own, and ``val`` shows what training may show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GRID = 3
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
NUM_PLACES = GRID * GRID
CENTER = NUM_PLACES // 2  # never held out: that is where single pictures are
HELD_OUT_PLACES = 2  # of every concept, of eight
HELD_OUT_SPLITS = ("val_style", "val_concept", "val_pair")


@dataclass(frozen=True)
class Cast:
    """Who may appear in a split: ``styles``, and the numbers of concepts by place, reading order."""

    styles: tuple[str, ...]
    concepts: tuple[int, ...]
    by_place: tuple[tuple[int, ...], ...]
    outer_places: bool  # only the eight around the center


def casts(
    styles: list[str], num_concepts: int, held_out_style: str | None, held_out: int, seed: int, pairs: bool
) -> dict[str, Cast]:
    """The casts by split, ``val_style`` only with a held-out style and ``val_concept`` only with held-out concepts.

    Args:
        held_out: the number of concepts that no training picture shows.
        pairs: whether there are scenes with places other than the center.
    """
    shown = tuple(style for style in styles if style != held_out_style)
    order = np.random.default_rng([seed, 0]).permutation(num_concepts)
    unseen, seen = (tuple(sorted(int(c) for c in part)) for part in (order[:held_out], order[held_out:]))
    outer = [place for place in range(NUM_PLACES) if place != CENTER]
    kept_from = {}
    for concept in range(num_concepts):
        rng = np.random.default_rng([seed, 1, concept])
        kept_from[concept] = {int(place) for place in rng.choice(outer, HELD_OUT_PLACES, replace=False)}
    places = range(NUM_PLACES)
    everywhere = tuple(tuple(c for c in seen if place not in kept_from[c]) for place in places)
    found = {"train": Cast(shown, seen, everywhere, False), "val": Cast(shown, seen, everywhere, False)}
    if held_out_style is not None:
        found["val_style"] = Cast((held_out_style,), seen, everywhere, False)
    if unseen:
        found["val_concept"] = Cast(shown, unseen, (unseen,) * NUM_PLACES, False)
    if pairs:
        elsewhere = tuple(tuple(c for c in seen if place in kept_from[c]) for place in places)
        found["val_pair"] = Cast(shown, seen, elsewhere, outer_places=True)
    return found
