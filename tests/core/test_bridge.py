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


def example() -> Any:
    spec = importlib.util.spec_from_file_location("bridge_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planned(given: dict[str, Any]) -> dict[str, Any] | str:
    """On a rank: where the visual tokens of a planned batch are, and what it counts."""
    from nemo_pre.parallel.sequence_layout import IGNORE_INDEX, IMAGE_TOKEN_INDEX, expand_labels, sequence_layout

    try:
        form = example().planned_form(given, IMAGE)
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


def chunk_of_the_last_stage() -> tuple[Any, Any]:
    """On a rank: a chunk that gives its parameter as losses, and the chunk as the example hears it."""
    from nemo_pre.terms.step_planner import LANGUAGE_MODEL

    model = torch.nn.Module()
    model.losses = torch.nn.Parameter(torch.ones(2, 12))
    model.config = SimpleNamespace(context_parallel_size=1, sequence_parallel=False, num_layers=2)
    model.pre_process, model.post_process = False, True
    model.forward = lambda **_: model.losses * 1
    chunk = example().QwenChunk(model)
    plan = SimpleNamespace(weights={LANGUAGE_MODEL: 0.25})
    chunk.enter = lambda batch, length: setattr(chunk, "micro_batch", SimpleNamespace(plan=plan))
    return model, chunk


def gradients() -> list[float]:
    """On a rank: of a language model's loss within a step, whose plan weighs it by a quarter, and outside of one."""
    model, chunk = chunk_of_the_last_stage()
    found = []
    for observed in (True, False):
        chunk.observed = observed
        chunk.start_step([{}])
        (gradient,) = torch.autograd.grad(model(input_ids=torch.zeros(2, 12)).sum(), [model.losses])
        found.append(gradient.unique().item())
    return found


def test_the_language_models_loss_has_its_weight_in_a_step():
    assert run_ranks(gradients, 1) == [[0.25, 1.0]]


def asked(part: str, name: str) -> str:
    _, chunk = chunk_of_the_last_stage()
    try:
        return str(getattr(getattr(chunk.config, part), name))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "part, name", [("vision_projection_config", "input_size"), ("vision_transformer_config", "image_mean")]
)
def test_what_is_not_known_of_the_model_is_refused_by_its_name(part, name):
    (found,) = run_ranks(asked, 1, part, name)
    assert f"An objective asks for {name} of" in found and "objective.pre.anchor=pre_llm" in found
