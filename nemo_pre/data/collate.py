"""Collating items into a micro-batch in NeVA's raw format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_pre.data.conversation import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

    from nemo_pre.data.dataset import Item


@dataclass(frozen=True)
class Collate:
    """Pads the text of B items to the constant T = ``text_tokens``.

    Returns ``tokens`` int64 [B, T] (-200 stands for a whole image), ``labels`` int64 [B, T] (shifted, -100
    where nothing is predicted), ``loss_mask`` float32 [B, T], ``position_ids`` int64 [B, T],
    ``attention_mask`` None (causal), ``media`` float32 [num_tiles, 3, H, W] in the order of the tags, or None
    where no item has an image (of items with features [num_tiles, tokens, d_vision], and ``pixels`` are the images if
    they are wanted), ``num_media_tiles``, the tiles of each image, and ``keys``, the items' names. With ``native``
    resolution ``media`` is [visual tokens, patches, pixels], each image is one tile, and ``media_grids`` has its rows
    and columns. Where objectives read features, ``targets`` has by objective [num_tiles, tokens, width]; it is empty
    where no item has an image.
    """

    text_tokens: int
    padding_id: int
    native: bool = False

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        import torch

        shape = (len(items), self.text_tokens)
        tokens = torch.full(shape, self.padding_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for row, item in enumerate(items):
            assert len(item.tokens) == len(item.labels) <= self.text_tokens, item.key
            tokens[row, : len(item.tokens)] = torch.tensor(item.tokens, dtype=torch.int64)
            labels[row, : len(item.labels)] = torch.tensor(item.labels, dtype=torch.int64)
        images = [image for item in items for image in item.images]
        pixels = [image for item in items for image in item.pixels]
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": (labels != IGNORE_INDEX).float(),
            "position_ids": torch.arange(self.text_tokens).expand(shape).contiguous(),
            "attention_mask": None,
            **joined_images(images, self.native),
            "keys": [item.key for item in items],
            **({"pixels": torch.cat(pixels)} if pixels else {}),
            **({"targets": joined_targets(items)} if any(item.targets for item in items) else {}),
        }


def joined_targets(items: list[Item]) -> dict[str, torch.Tensor]:
    """The features of all items' images, by objective; an objective without an image is left out."""
    import torch

    names = dict.fromkeys(name for item in items for name in item.targets)
    found = {name: [image for item in items for image in item.targets.get(name, [])] for name in names}
    return {name: torch.cat(images) for name, images in found.items() if images}


def joined_images(images: list[torch.Tensor], native: bool) -> dict[str, Any]:
    """The part of a batch that comes of its images."""
    import torch

    if not native:
        return {"media": torch.cat(images) if images else None, "num_media_tiles": [len(image) for image in images]}
    return {
        "media": torch.cat([image.flatten(0, 1) for image in images]) if images else None,
        "num_media_tiles": [1] * len(images),
        "media_grids": [tuple(image.shape[:2]) for image in images],
    }
