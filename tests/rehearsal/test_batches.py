"""Micro-batches without data: the kinds and lengths that a run's own may have."""

from itertools import islice

import pytest

from nemo_pre.config.compose import compose_run
from nemo_pre.config.derived import num_visual_tokens
from nemo_pre.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from nemo_pre.planner.load import largest_load
from nemo_pre.rehearsal.batches import LARGEST, MIXED, SMALLEST, TEXT, grid_of, kinds_of_step, micro_batch, steps

SQUARE = ["experiment=siglip2_qwen25_1_5b_laver_stage1_align", "trainer.micro_batch_size=2"]
NATIVE = ["experiment=qwen25vl_qwen25_7b_stage1_align", "trainer.micro_batch_size=2"]
PACKED = [*SQUARE, "data.packing=true", "data.sequence_length=4096"]
TILES = [*SQUARE, "data.max_tiles=5", "data.sequence_length=4096", "trainer.val_samples=0"]


def lengths(config, batch):
    """Tokens of each row of the combined sequence, padding left out."""
    found = []
    grids = iter(batch.get("media_grids") or [])
    tiles = iter(batch["num_media_tiles"])
    for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
        images = int((tokens == IMAGE_TOKEN_INDEX).sum())
        each = [next(tiles) for _ in range(images)]
        native = [rows * columns for rows, columns in (next(grids) for _ in range(images) if "media_grids" in batch)]
        visual = native or [number * num_visual_tokens(config.model) for number in each]
        learned = (labels != IGNORE_INDEX).nonzero()
        found.append(int(learned.max()) + 1 - images + sum(visual))
    return found


@pytest.mark.parametrize("words", [SQUARE, NATIVE, PACKED, TILES], ids=["square", "native", "packed", "tiles"])
def test_the_largest_is_what_the_plan_takes_for_the_largest(words):
    config = compose_run(words)
    batch, load = micro_batch(config, LARGEST, 0), largest_load(config)
    assert lengths(config, batch) == [config.data.sequence_length] * 2
    assert int((batch["tokens"] == IMAGE_TOKEN_INDEX).sum()) == 2 * load.images
    if "media_grids" in batch:
        assert sum(rows * columns for rows, columns in batch["media_grids"]) == 2 * load.visual
    else:
        assert len(batch["media"]) == 2 * load.tiles


@pytest.mark.parametrize("words", [SQUARE, NATIVE, PACKED, TILES], ids=["square", "native", "packed", "tiles"])
def test_every_kind_fits_and_text_alone_has_no_image(words):
    config = compose_run(words)
    for kind in kinds_of_step(config, 6, replica=0):
        batch = micro_batch(config, kind, 0)
        assert max(lengths(config, batch)) <= config.data.sequence_length
        assert (batch["media"] is None) == (kind == TEXT)
        assert int(batch["tokens"].max()) < config.model.language.vocab_size


def test_native_resolution_has_the_smallest_and_several_grids_in_one_micro_batch():
    config = compose_run(NATIVE)
    smallest, mixed = micro_batch(config, SMALLEST, 0), micro_batch(config, MIXED, 0)
    vision = config.model.vision
    assert all(rows * columns == vision.min_visual_tokens for rows, columns in smallest["media_grids"])
    assert len(set(mixed["media_grids"])) > 1
    assert len(mixed["media"]) == sum(rows * columns for rows, columns in mixed["media_grids"])


def test_features_come_in_the_place_of_pixels_and_both_where_a_frozen_model_looks():
    config = compose_run(["experiment=siglip2_qwen25_7b_stage2_frozen_pre", "data.features=features"])
    batch = micro_batch(config, LARGEST, 0)
    assert batch["media"].shape[1:] == (num_visual_tokens(config.model), config.model.vision.hidden_size)
    assert "pixels" not in batch
    looking = ["objective.pre.anchor=external", "objective.pre.external_path=somewhere"]
    config = compose_run(["experiment=siglip2_qwen25_7b_stage2_frozen_pre", "data.features=features", *looking])
    assert micro_batch(config, LARGEST, 0)["pixels"].shape[1] == 3


def test_another_replica_has_another_number_of_images_in_as_many_micro_batches():
    config = compose_run(NATIVE)
    first, second = kinds_of_step(config, 8, 0), kinds_of_step(config, 8, 1)
    assert len(first) == len(second) == 8
    assert first.count(TEXT) < second.count(TEXT)
    assert first[:4] == second[:4] == [LARGEST] * 4


def test_every_step_has_the_same_micro_batches():
    config = compose_run(SQUARE)
    first, second, again, _ = islice(steps(config, 2, 0), 4)
    assert (first["tokens"] == again["tokens"]).all() and not (first["tokens"] == second["tokens"]).all()


@pytest.mark.parametrize("tokens, least, grid", [(1280, False, (32, 40)), (4, True, (2, 2)), (257, False, (16, 16))])
def test_grids_are_no_strips(tokens, least, grid):
    assert grid_of(tokens, least) == grid


def test_a_prime_number_of_tokens_is_missed_to_the_side_that_is_allowed():
    assert grid_of(13, least=True) == (2, 7) and grid_of(13) == (3, 4)
