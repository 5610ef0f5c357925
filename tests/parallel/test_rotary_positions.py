"""2-D positions as LaVer's architecture figure has them, and their variants."""

from __future__ import annotations

import pytest
import torch

from nemo_pre.parallel.rotary_positions import rotary_positions
from nemo_pre.parallel.sequence_layout import SequenceLayout, sequence_layout, square_tiles

IMAGE = -200


def layout_of(sizes: list[int | str]) -> SequenceLayout:
    """One row: "t" is a text token, a number an image of one tile with that many visual tokens."""
    text, visual, image = [], [], []
    for place, entry in enumerate(sizes):
        is_text = entry == "t"
        for _ in range(1 if is_text else int(entry)):
            text.append(0 if is_text else -1)
            visual.append(-1 if is_text else sum(v >= 0 for v in visual))
            image.append(-1 if is_text else sum(e != "t" for e in sizes[:place]))
    tiles = sum(entry != "t" for entry in sizes)
    rows = [torch.tensor([row]) for row in (text, visual, image)]
    zeros = torch.zeros_like(rows[0])
    return SequenceLayout(rows[0], rows[1], rows[2], zeros, sum(v >= 0 for v in visual), tiles, ())


def pairs(positions_3BS: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(positions_3BS[1, 0].tolist(), positions_3BS[2, 0].tolist(), strict=True))


def test_the_figures_example():
    layout = layout_of(["t", "t", 12, "t"])
    found = pairs(rotary_positions(layout, torch.tensor([[4, 3]]), "2d"))
    patches = [(2 + i, 2 + j) for i in range(4) for j in range(3)]
    assert patches[0] == (2, 2) and patches[-1] == (5, 4)
    assert found == [(0, 0), (1, 1), *patches, (6, 6)]


def test_images_of_native_resolution_follow_one_another_at_the_largest_position_plus_one():
    layout = layout_of([6, "t", 4, "t"])
    found = pairs(rotary_positions(layout, torch.tensor([[2, 3], [1, 4]]), "2d"))
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (3, 3), (4, 4), (4, 5), (4, 6), (4, 7), (8, 8)]


def test_mrope_keeps_an_images_time_at_its_start():
    layout = layout_of(["t", 4, "t"])
    positions = rotary_positions(layout, torch.tensor([[2, 2]]), "mrope")
    assert positions[0, 0].tolist() == [0, 1, 1, 1, 1, 3]
    assert positions[1, 0].tolist() == [0, 1, 1, 2, 2, 3]
    assert positions[2, 0].tolist() == [0, 1, 2, 1, 2, 3]


@pytest.mark.parametrize("kind", ["1d", "2d", "mrope"])
def test_text_counts_on_every_axis(kind):
    layout = layout_of(["t"] * 5)
    positions = rotary_positions(layout, torch.zeros(0, 2, dtype=torch.int64), kind)
    assert positions.tolist() == [[[0, 1, 2, 3, 4]]] * 3


def test_one_dimension_counts_visual_tokens_too():
    positions = rotary_positions(layout_of(["t", 4, "t"]), torch.tensor([[2, 2]]), "1d")
    assert positions.tolist() == [[[0, 1, 2, 3, 4, 5]]] * 3


@pytest.mark.parametrize("kind", ["1d", "2d", "mrope"])
def test_an_isolated_image_starts_at_zero_wherever_it_lies(kind):
    grids = torch.tensor([[2, 2], [2, 2]])
    packed = rotary_positions(layout_of([4, 4]), grids, kind, isolated_images=True)
    assert torch.equal(packed[:, :, :4], packed[:, :, 4:])
    alone = rotary_positions(layout_of([4]), grids[:1], kind)
    assert torch.equal(packed[:, :, :4], alone)


def test_tiles_of_one_image_lie_on_the_diagonal_and_a_cut_image_keeps_its_places():
    tokens = torch.tensor([[5, IMAGE, 6]])
    layout = sequence_layout(tokens, square_tiles([2], 4), image_token=IMAGE, sequence_length=8)
    found = pairs(rotary_positions(layout, torch.tensor([[2, 2], [2, 2]]), "2d"))
    assert found == [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (3, 4), (4, 3)]  # the last token is cut off
    isolated = pairs(rotary_positions(layout, torch.tensor([[2, 2], [2, 2]]), "2d", isolated_images=True))
    assert isolated[1:] == [(r - 1, c - 1) for r, c in found[1:]]


def test_rows_of_a_micro_batch_do_not_disturb_each_other():
    tokens = torch.tensor([[5, IMAGE, 6, 7], [IMAGE, IMAGE, 8, 9], [1, 2, 3, 4]])
    layout = sequence_layout(tokens, square_tiles([1, 1, 1], 4), image_token=IMAGE, sequence_length=12)
    together = rotary_positions(layout, torch.tensor([[2, 2]] * 3), "2d")
    for row, tiles in enumerate([[1], [1, 1], []]):
        alone = sequence_layout(tokens[row : row + 1], square_tiles(tiles, 4), IMAGE, 12)
        assert torch.equal(together[:, row : row + 1], rotary_positions(alone, torch.tensor([[2, 2]] * 3), "2d"))


def test_an_unknown_kind_and_grids_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="choose one of 1d, 2d, mrope"):
        rotary_positions(layout_of([4]), torch.tensor([[2, 2]]), "3d")
    with pytest.raises(ValueError, match="fewer tokens than the 4 visual tokens"):
        rotary_positions(layout_of([4]), torch.tensor([[1, 3]]), "2d")
