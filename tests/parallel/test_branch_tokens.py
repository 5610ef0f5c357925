"""Images that parallelism cuts apart come together whole, each on one rank, and gradients find their way back."""

from __future__ import annotations

import pytest
import torch

from nemo_pre.parallel.branch_tokens import branch_tokens
from nemo_pre.parallel.sequence_layout import sequence_layout
from nemo_pre.parallel.token_streams import StreamShape, VisualBranch, image_rows, packed_images
from tests.parallel.branch_ranks import gather_images
from tests.ranks import run_on_standing_ranks

IMAGE_TOKEN = -200
TOKENS = torch.tensor([[5, IMAGE_TOKEN, 6, IMAGE_TOKEN, 7], [IMAGE_TOKEN, 8, 9, 10, 11]])


def branch(together: bool = False) -> VisualBranch:
    layout = sequence_layout(TOKENS, [[(2, 2)]] * 3, IMAGE_TOKEN, 16)
    mask = torch.tensor([1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1]).bool()
    return VisualBranch(packed_images(layout, image_rows(layout), 8), mask, True, together)


@pytest.mark.parametrize("together", [False, True], ids=["per-image", "together"])
@pytest.mark.parametrize("cut", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=["whole", "SP2", "CP2", "SP2-CP2"])
def test_every_image_is_whole_on_exactly_one_rank(cut, together):
    tp, cp = cut
    lay = branch(together)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 8, 3, generator=generator)
    seen = []
    for images, image_of, masked, _ in run_on_standing_ranks(gather_images, tp * cp, lay, whole, tp, cp):
        for image in image_of.unique().tolist():
            expected = whole[lay.layout.visual_image_BS == image]
            assert torch.equal(images[image_of == image], expected)
            seen.append(image)
        numbers = [lay.layout.visual_source_BS[lay.layout.visual_image_BS == image] for image in image_of.unique()]
        if numbers:
            assert torch.equal(masked, lay.masked_N[torch.cat(numbers)].nonzero().squeeze(1))
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.parametrize("cut", [(2, 1), (2, 2)], ids=["SP2", "SP2-CP2"])
def test_gradients_come_back_to_the_rank_that_has_the_token(cut):
    tp, cp = cut
    lay = branch()
    whole = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1))
    for rank, (_, _, _, gradient) in enumerate(run_on_standing_ranks(gather_images, tp * cp, lay, whole, tp, cp)):
        tokens = branch_tokens(lay, StreamShape(True, "2d", tp, cp, rank // tp), rank % tp)
        assert len(gradient) == len(tokens.position)
        from nemo_pre.parallel.sequence_layout import local_positions

        here = local_positions(8, tp, rank % tp, cp, rank // tp)
        image = lay.layout.visual_image_BS[:, here].transpose(0, 1).reshape(-1)[tokens.position]
        assert torch.equal(gradient, (image[:, None] + 1).float().expand(-1, 3))
