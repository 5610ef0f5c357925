"""What a token may attend to, and where it lies, with sequences side by side and cut over ranks."""

from __future__ import annotations

import pytest
import torch

from nemo_pre.parallel.sequence_layout import sequence_layout
from nemo_pre.parallel.token_streams import (
    IMAGE,
    StreamShape,
    VisualBranch,
    decoder_streams,
    gathered_order,
    image_rows,
    may_attend,
    packed_images,
    packed_length,
)

IMAGE_TOKEN = -200
TOKENS = torch.tensor([[5, IMAGE_TOKEN, 6, IMAGE_TOKEN, 7], [IMAGE_TOKEN, 8, 9, 10, 11], [1, 2, 3, 4, 5]])
GRID = (2, 2)


def samples(length: int = 16):
    return sequence_layout(TOKENS, [[GRID]] * 3, IMAGE_TOKEN, length)


def packed(length: int = 8) -> VisualBranch:
    layout = samples()
    return VisualBranch(packed_images(layout, image_rows(layout), length), torch.zeros(12, dtype=torch.bool), True)


def shape(**changes) -> StreamShape:
    return StreamShape(**{"mixed_attention": True, "rope": "2d", **changes})


def allowed(row: int, branch: VisualBranch | None = None, **changes) -> torch.Tensor:
    structure = decoder_streams(samples(), branch, shape(**changes)).structure_BK3
    assert structure is not None
    return may_attend(structure, structure)[row]


def test_images_see_themselves_both_ways_and_everything_else_is_causal():
    found = allowed(0)
    causal = torch.ones(16, 16).tril().bool()
    expected = causal.clone()
    expected[1:5, 1:5] = True  # text, 4 visual tokens, text, 4 visual tokens, text, padding
    expected[6:10, 6:10] = True
    assert torch.equal(found, expected)
    assert torch.equal(allowed(2), causal), "text alone is causal"


def test_causal_attention_needs_no_structure():
    assert decoder_streams(samples(), None, shape(mixed_attention=False)).structure_BK3 is None


def test_packed_images_see_themselves_and_nothing_else():
    branch = packed()
    found = allowed(0, branch)
    assert torch.equal(found[:16, :16], allowed(0)), "the samples do not notice the branch"
    assert not found[:16, 16:].any() and not found[16:, :16].any()
    image = branch.layout.visual_image_BS[0]
    inside = (image[:, None] == image[None, :]) & (image >= 0)
    own = found[16:, 16:]
    assert torch.equal(own & (image >= 0)[:, None], inside)
    assert own.diagonal().all(), "padding sees itself, so that no softmax is empty"


def test_a_branch_of_whole_samples_repeats_their_rules_apart_from_them():
    found = allowed(0, VisualBranch(samples(), torch.zeros(12, dtype=torch.bool), False))
    assert torch.equal(found[16:, 16:], found[:16, :16])
    assert not found[:16, 16:].any() and not found[16:, :16].any()


def test_images_are_packed_evenly_and_completely():
    layout = samples()
    rows = image_rows(layout)
    assert sorted(image for row in rows for image in row) == [0, 1, 2]
    assert packed_length(layout, rows) == 4  # three images, three rows
    one_row = packed_images(layout, [[0, 1, 2], [], []], 12)
    assert one_row.visual_source_BS[0].tolist() == list(range(12))
    assert one_row.visual_image_BS[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (one_row.visual_source_BS[1:] == -1).all() and (one_row.text_source_BS == -1).all()


@pytest.mark.parametrize("cut", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=["whole", "SP2", "CP2", "SP2-CP2"])
def test_cut_over_ranks_the_tokens_keep_their_rules_and_positions(cut):
    """Permuted back, what attention sees on a cut sequence is what it sees on the whole one."""
    tp, cp = cut
    branch = packed()
    whole = decoder_streams(samples(), branch, shape())
    order = gathered_order([16, 8], tp, cp)
    assert sorted(order.tolist()) == list(range(24))
    assert whole.structure_BK3 is not None
    expected = may_attend(whole.structure_BK3, whole.structure_BK3)
    positions = []
    for rank in range(cp):
        cut_up = decoder_streams(samples(), branch, shape(tp_size=tp, cp_size=cp, cp_rank=rank))
        assert cut_up.lengths == (16 // (tp * cp), 8 // (tp * cp))
        assert cut_up.structure_BK3 is not None
        assert torch.equal(may_attend(cut_up.structure_BK3, cut_up.structure_BK3), expected[:, order][:, :, order])
        positions.append(cut_up.positions_3BQ)
    assert torch.equal(torch.cat(positions, dim=2), whole.positions_3BQ[:, :, order])


def test_a_ranks_pieces_lie_side_by_side():
    assert gathered_order([8, 4], 2, 1).tolist() == [0, 1, 2, 3, 8, 9, 4, 5, 6, 7, 10, 11]
    assert gathered_order([8], 1, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]  # zigzag


def test_images_of_different_rows_have_different_numbers():
    structure = decoder_streams(samples(), packed(), shape()).structure_BK3
    assert structure is not None
    of_rows = [set(structure[row, :16, IMAGE].tolist()) - {-1} for row in range(3)]
    assert of_rows == [{0, 1}, {2}, set()]
