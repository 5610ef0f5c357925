"""What there is to learn of each patch of a composed scene: the name of its object, and that object's box.

Names alone leave a tower with nothing that tells two equal digits side by side from one, or a large one from a small
one; the box does, and says the place too. A detector learns the same two things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_pre.diagnostics.patches import NOTHING, patch_classes
from nemo_pre.diagnostics.states import square_patches

OBJECTS = {"digits": "digit", "pictures": "concept"}  # of a scene: the list of its objects, and the field of a name
NO_OBJECT = 0  # the class of a patch that shows none; names count from 1


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: its grey value in the mask, its name, and x0, y0, x1, y1 in pixels, the last two one past
    its end."""

    instance: int
    name: str
    box: tuple[float, float, float, float]


def scene_objects(scene: Mapping[str, Any], where: str, field: str | None = None) -> list[SceneObject]:
    """The objects that a scene's record lists.

    Args:
        field: of an object, that holds its name; None: ``digit`` or ``concept``, whichever kind of scene it is.

    Raises:
        ValueError: the scene lists none of the known kinds, or an object has no such field.
    """
    kind = next((name for name in OBJECTS if name in scene), None)
    if kind is None:
        raise ValueError(f"{where} lists no objects: name a set of nemo-pre data demo or nemo-pre data emoji.")
    wanted = field or OBJECTS[kind]
    found = []
    for placed in scene[kind]:
        if wanted not in placed:
            raise ValueError(f"{where} has no name={wanted} of an object: choose of {', '.join(sorted(placed))}.")
        found.append(SceneObject(placed["instance"], str(placed[wanted]), tuple(placed["box"])))
    return found


def patch_labels(
    mask_HW: Tensor, objects: Sequence[SceneObject], numbers: Mapping[str, int], size: tuple[int, int], side: int
) -> tuple[Tensor, Tensor]:
    """The class ``[P]`` and the box ``[P, 4]`` of each of the ``side * side`` patches, row by row.

    A patch belongs to the object that covers most of it, if that is a quarter (:mod:`nemo_pre.diagnostics.patches`).

    Args:
        mask_HW: int64, objects' instances, 0 where none is; of the picture as the tower sees it.
        numbers: the class of each name, from 1; an object whose name is not there counts as unlabelled.
        size: width and height in pixels of the scene that boxes are of.

    Returns:
        int64, ``NO_OBJECT`` for a patch without one and ``NOTHING`` for one that teaches nothing; float32, fractions
        of width and height, zeros where no object is.
    """
    width, height = size
    shown = patch_classes(square_patches(mask_HW[None], side, side)[..., 0], background=0)
    classes = torch.full_like(shown, NOTHING)
    classes[shown == 0] = NO_OBJECT
    boxes = torch.zeros(len(shown), 4)
    for each in objects:
        here = shown == each.instance
        classes[here] = numbers.get(each.name, NOTHING)
        boxes[here] = torch.tensor(each.box) / torch.tensor([width, height, width, height])
    return classes, boxes
