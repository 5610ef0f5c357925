"""What of the example for Megatron-Bridge needs no GPU: a batch of its is laid out as its model does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

pytestmark = pytest.mark.core
EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron_bridge_qwen25_vl.py"
IMAGE, PAD = 99, 0
GRIDS = [[1, 4, 6], [1, 2, 2], [1, 4, 4]]  # patches: 6, 1 and 4 visual tokens
ROWS = [
    [5, *[IMAGE] * 6, 6, 7, 8, PAD, PAD],
    [5, IMAGE, *[IMAGE] * 4, 9, 8, 7, 6, 5, 4],  # two images side by side
]


def batch(rows: list[list[int]], grids: list[list[int]], first_loss: int = 8) -> dict[str, Any]:
    tokens = torch.tensor(rows)
    mask = torch.zeros(tokens.shape)
    mask[:, first_loss:] = (tokens[:, first_loss:] != PAD).float()
    visual = SimpleNamespace(image_grid_thw=torch.tensor(grids) if grids else None)
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": mask, "visual_inputs": visual}


def planned(given: dict[str, Any]) -> dict[str, Any] | str:
    """On a rank: where the visual tokens of a planned batch are, and what it counts."""
    from nemo_pre.parallel.sequence_layout import IGNORE_INDEX, IMAGE_TOKEN_INDEX, expand_labels, sequence_layout

    spec = importlib.util.spec_from_file_location("bridge_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        form = module.planned_form(given, IMAGE)
    except ValueError as error:
        return str(error)
    tiles = [[grid] for grid in form["media_grids"]]
    length = given["tokens"].shape[1]
    layout = sequence_layout(form["tokens"], tiles, IMAGE_TOKEN_INDEX, length)
    labels, mask = expand_labels(layout, form["labels"], form["loss_mask"], IGNORE_INDEX)
    return {"visual": layout.visual_source_BS, "labels": labels, "mask": mask}


def test_a_batch_of_the_bridge_is_laid_out_as_its_model_does():
    given = batch(ROWS, GRIDS)
    ((found,),) = zip(run_ranks(planned, 1, given), strict=True)
    assert torch.equal(found["visual"] >= 0, given["tokens"] == IMAGE)
    order = found["visual"][found["visual"] >= 0]
    assert order.tolist() == list(range(11)), "the tokens of images, in the order of the model's features"
    assert torch.equal(found["mask"] > 0, given["loss_mask"] > 0)
    counted = given["loss_mask"] > 0
    assert torch.equal(found["labels"][counted], given["labels"][counted])


@pytest.mark.parametrize(
    "given, words",
    [
        (batch(ROWS, GRIDS[:2]), "other image placeholders"),
        (batch(ROWS, [*GRIDS, [1, 2, 2]]), "other image placeholders"),
        (batch(ROWS, []), "other image placeholders"),
        (batch(ROWS, GRIDS, first_loss=6), "behind an image's last token"),
    ],
)
def test_a_batch_that_cannot_be_laid_out_is_refused_in_one_sentence(given, words):
    (found,) = run_ranks(planned, 1, given)
    assert words in found and found.endswith(".") and found.count(". ") == 0


def test_videos_are_refused():
    given = batch(ROWS, GRIDS)
    given["visual_inputs"].video_grid_thw = torch.tensor([[2, 4, 4]])
    (sentence,) = run_ranks(planned, 1, given)
    assert sentence == "A batch holds videos, whose tokens objectives do not know: leave them out of the data."
