"""A loader that needs no data: micro-batches of the lengths and the kinds that a run's own may have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_pre.config.derived import num_visual_tokens
from nemo_pre.config.run import RunConfig
from nemo_pre.config.vision_families import FAMILIES, feature_width, is_native
from nemo_pre.objectives.registry import wanted_targets
from nemo_pre.planner.load import largest_load

LARGEST, MIXED, SMALLEST, TEXT = "largest", "mixed", "smallest", "text alone"
LABELLED = 4  # the last quarter of a row's text is learned
TEXT_TOKENS = 16  # of each sample of a row with several


def special_kinds(config: RunConfig) -> list[str]:
    """The kinds of micro-batches, beside the largest, that the run's loader may give."""
    kinds = []
    if is_native(config.model.vision) or config.data.packing or config.data.max_tiles > 1:
        kinds.append(MIXED)
    if is_native(config.model.vision):
        kinds.append(SMALLEST)
    return [*kinds, TEXT]


def kinds_of_step(config: RunConfig, micro_batches: int, replica: int) -> list[str]:
    """The kinds of a step's micro-batches in their order: the largest first, so that they fill the schedule.

    Another replica than the first one has another number of images: its special micro-batches come in another order,
    and one of the largest before them is of text alone where there are several.
    """
    special = special_kinds(config)
    kinds = [LARGEST] * (micro_batches - len(special)) + special
    if replica and micro_batches > 1:
        kinds = kinds[: -len(special)] + special[::-1]
        kinds[max(len(kinds) - len(special) - 1, 0)] = TEXT
    return kinds


def micro_batch(config: RunConfig, kind: str, seed: int) -> dict[str, Any]:
    """A micro-batch as :mod:`nemo_pre.data` collates it, of noise and zeros."""
    import random

    from nemo_pre.data.collate import Collate
    from nemo_pre.data.packed import PackedCollate
    from nemo_pre.data.preprocessing import num_text_tokens

    rows, generator = config.trainer.micro_batch_size, random.Random(seed)
    native = is_native(config.model.vision)
    if config.data.packing:
        packed = PackedCollate(config.data.sequence_length, 0, native)
        return packed([_samples_of_row(config, kind, generator, row) for row in range(rows)])
    collate = Collate(num_text_tokens(config), 0, native)
    return collate([_sample(config, kind, generator, row) for row in range(rows)])


def _sample(config: RunConfig, kind: str, generator: Any, row: int) -> Any:
    """A row that is one sample."""
    from nemo_pre.data.preprocessing import num_text_tokens

    shapes = _image_shapes(config, kind, row)[: 1 if kind != MIXED else None]
    visual = sum(_visual_tokens(config, shape) for shape in shapes)
    room = min(num_text_tokens(config) - len(shapes), config.data.sequence_length - visual)
    words = max(room if kind != SMALLEST else room // 2, 1)
    return _item(config, shapes, words, generator)


def _samples_of_row(config: RunConfig, kind: str, generator: Any, row: int) -> list[Any]:
    """A packed row: as many samples with an image as the plan's largest row has, the last one to its end."""
    length = config.data.sequence_length
    if kind == TEXT:
        return [_item(config, [], length // 2, generator), _item(config, [], length - length // 2, generator)]
    shapes = _image_shapes(config, kind, row)
    images = largest_load(config).images if kind == LARGEST else len(shapes)
    left, samples = length, []
    for number in range(images):
        shape = shapes[number % len(shapes)]
        behind = sum(_visual_tokens(config, shapes[later % len(shapes)]) + 1 for later in range(number + 1, images))
        room = left - behind - _visual_tokens(config, shape)
        words = room if number == images - 1 and kind == LARGEST else min(TEXT_TOKENS, room)
        if words < 1:
            break
        samples.append(_item(config, [shape], words, generator))
        left -= _visual_tokens(config, shape) + words
    return samples


def _image_shapes(config: RunConfig, kind: str, row: int) -> list[tuple[int, int]]:
    """Rows and columns of visual tokens of each image of a row with native resolution, else (tiles, 0)."""
    vision = config.model.vision
    if kind == TEXT:
        return []
    if not is_native(vision):
        tiles = config.data.max_tiles
        if kind == MIXED:
            return [(1, 0)] if tiles == 1 or row % 2 else [(max(tiles // 2, 1), 0)]
        return [(tiles, 0)]
    assert vision.min_visual_tokens is not None and vision.max_visual_tokens is not None
    large, small = grid_of(vision.max_visual_tokens), grid_of(vision.min_visual_tokens, least=True)
    middle = grid_of((vision.min_visual_tokens + vision.max_visual_tokens) // 3)
    if kind == MIXED:
        return [small, middle[::-1]] if row % 2 == 0 else [middle]
    return [large if kind == LARGEST else small]


def grid_of(tokens: int, least: bool = False) -> tuple[int, int]:
    """The squarest grid of ``tokens`` visual tokens; where only a strip has as many, of a few less, or with ``least``
    of a few more."""
    while True:
        rows = next(rows for rows in range(int(tokens**0.5), 0, -1) if tokens % rows == 0)
        if tokens // rows <= 4 * rows or tokens < 4:
            return rows, tokens // rows
        tokens += 1 if least else -1


def _visual_tokens(config: RunConfig, shape: tuple[int, int]) -> int:
    return shape[0] * (shape[1] if is_native(config.model.vision) else num_visual_tokens(config.model))


def _item(config: RunConfig, shapes: list[tuple[int, int]], words: int, generator: Any) -> Any:
    """A sample of images and then ``words`` words."""
    from nemo_pre.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
    from nemo_pre.data.dataset import Item
    from nemo_pre.data.preprocessing import looks_at_pixels

    vocabulary = config.model.language.vocab_size
    tokens = [IMAGE_TOKEN_INDEX] * len(shapes) + [generator.randrange(vocabulary) for _ in range(words)]
    learned = max(words // LABELLED, 1)
    labels = [IGNORE_INDEX] * (len(tokens) - learned) + tokens[-learned:]
    pictures = [_pixels(config, shape) for shape in shapes]
    targets = {
        name: [_features(_width_of(target), num_visual_tokens(config.model), config) for _ in shapes]
        for name, target in wanted_targets(config).items()
        if target.features is not None
    }
    if config.data.features is None:
        return Item("rehearsed", tokens, labels, pictures, [], targets)
    read = [_features(feature_width(config.model.vision), num_visual_tokens(config.model), config) for _ in shapes]
    return Item("rehearsed", tokens, labels, read, pictures if looks_at_pixels(config) else [], targets)


def _pixels(config: RunConfig, shape: tuple[int, int]) -> Any:
    import torch

    vision = config.model.vision
    if not is_native(vision):
        return torch.zeros(shape[0], 3, vision.image_size, vision.image_size)
    return torch.zeros(*shape, FAMILIES[vision.family].merge ** 2, 3 * vision.patch_size**2)


def _features(width: int, tokens: int, config: RunConfig) -> Any:
    """Features of one image as they are stored: in the run's precision."""
    import torch

    return torch.zeros(1, tokens, width, dtype=torch.float32 if config.precision.name == "fp32" else torch.bfloat16)


def _width_of(target: Any) -> int:
    """Width of an objective's stored features.

    Raises:
        ValueError: the directory that names it is not there.
    """
    from nemo_pre.data.features import read_features

    return read_features(target.features, target.option("features")).width


def steps(config: RunConfig, micro_batches: int, replica: int) -> Iterator[dict[str, Any]]:
    """The micro-batches of one step after the other; all steps have the same."""
    kinds = kinds_of_step(config, micro_batches, replica)
    while True:
        for index, kind in enumerate(kinds):
            yield micro_batch(config, kind, seed=index + 1000 * replica)
