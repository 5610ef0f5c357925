"""What a patch is taught: the object that covers it, by hand."""

import pytest
import torch

from nemo_pre.diagnostics.patches import NOTHING
from nemo_pre.teaching.labels import NO_OBJECT, SceneObject, patch_labels, scene_objects

DIGITS = {
    "layout": "row",
    "digits": [
        {"instance": 1, "digit": 7, "scan": 3, "box": [0, 0, 4, 3]},
        {"instance": 2, "digit": 2, "scan": 4, "box": [4, 4, 8, 8]},
    ],
}
PICTURES = {"pictures": [{"instance": 1, "class": 3, "concept": "red apple", "category": "food", "box": [0, 0, 9, 9]}]}


def test_a_patch_has_the_name_and_the_box_of_the_object_that_covers_a_quarter_of_it():
    mask = torch.tensor(
        [
            [1, 1, 1, 1, 0, 0, 0, 0],  # patches of 4 x 4 pixels: 12 pixels of the 7; nothing
            [1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 2, 2, 2, 2, 2],  # 3 pixels of the 2, less than a quarter; all of it
            [0, 0, 0, 2, 2, 2, 2, 2],
            [0, 0, 0, 2, 2, 2, 2, 2],
            [0, 0, 0, 0, 2, 2, 2, 2],
        ]
    )
    objects = scene_objects(DIGITS, "here")
    classes, boxes = patch_labels(mask, objects, {"2": 1, "7": 2}, (8, 16), side=2)
    assert classes.tolist() == [2, NO_OBJECT, NO_OBJECT, 1]
    seven, two = [0, 0, 4 / 8, 3 / 16], [4 / 8, 4 / 16, 1, 8 / 16]  # of a scene 8 wide and 16 high
    assert torch.equal(boxes, torch.tensor([seven, [0, 0, 0, 0], [0, 0, 0, 0], two]))


def test_two_equal_digits_in_one_patch_do_not_count_together():
    """Each covers 3 of 16 pixels, so none a quarter, although a 5 covers 6."""
    mask = torch.zeros(4, 4, dtype=torch.int64)
    mask[0, :3], mask[3, :3] = 1, 2
    fives = [SceneObject(1, "5", (0, 0, 3, 1)), SceneObject(2, "5", (0, 3, 3, 4))]
    assert patch_labels(mask, fives, {"5": 1}, (4, 4), side=1)[0].tolist() == [NO_OBJECT]


def test_an_object_without_a_number_teaches_nothing_and_is_not_the_background():
    mask = torch.ones(4, 4, dtype=torch.int64)
    classes, _ = patch_labels(mask, [SceneObject(1, "yak", (0, 0, 4, 4))], {"ox": 1}, (4, 4), side=1)
    assert classes.tolist() == [NOTHING]


def test_objects_are_named_by_a_field_of_theirs():
    assert [(each.instance, each.name) for each in scene_objects(DIGITS, "here")] == [(1, "7"), (2, "2")]
    assert [each.name for each in scene_objects(PICTURES, "here")] == ["red apple"]
    assert [each.name for each in scene_objects(PICTURES, "here", "category")] == ["food"]
    with pytest.raises(ValueError, match=r"here has no name=colour of an object: choose of box, category, class"):
        scene_objects(PICTURES, "here", "colour")
    with pytest.raises(ValueError, match="here lists no objects"):
        scene_objects({"layout": "row"}, "here")
