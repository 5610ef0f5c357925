"""What a model is asked for: the visual tokens of a few pictures, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nemo_pre.diagnostics.patches import NOTHING, patch_classes
from nemo_pre.diagnostics.replicas import Replicas
from nemo_pre.diagnostics.samples import UNLABELLED, DiagnosticSample

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Grid:
    """Visual tokens ``first``, ``first + 1`` ... of an image are the patches of the whole picture, row by row."""

    first: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass
class VisualStates:
    """The visual tokens of some pictures, in the order of pictures and patches; the rank that has a layer has them.

    Attributes:
        image: ``[n]`` which picture each token is of.
        grids: of each picture, the tokens that are its patches.
        classes: ``[n]`` int64 on the CPU, what each patch shows; None without masks.
        entering: ``[n, d]`` what enters the decoder (layer 0); on every rank.
        layers: ``[n, d]`` the output of each decoder layer, before the final norm; 0 is ``entering``.
        attention: ``[pictures, heads]`` of each layer, see :func:`attention_mass`.
        words: ``[n]`` the most likely next token at each visual token; None where the last layer is not.
        instances: of each picture, ``[patches, pixels]`` numbers of the scene's objects; empty without masks.
    """

    image: Tensor
    grids: list[Grid]
    classes: Tensor | None
    entering: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    words: Tensor | None = None
    instances: list[Tensor] = field(default_factory=list)

    def pooled(self, layer: int) -> Tensor:
        """The mean token ``[pictures, d]`` of each picture, float64."""
        tokens = self.layers[layer].double()
        image = self.image.to(tokens.device)
        sums = tokens.new_zeros(len(self.grids), tokens.shape[1]).index_add(0, image, tokens)
        return sums / torch.bincount(image, minlength=len(self.grids))[:, None]


class Model(Protocol):
    """Where the states come from.

    Attributes:
        num_layers: of the decoder.
        vocabulary: number of tokens that can be the next.
        replicas: of the model, which share the pictures out.
    """

    num_layers: int
    vocabulary: int
    replicas: Replicas

    def states(self, samples: Sequence[DiagnosticSample], everything: bool) -> VisualStates:
        """States of the samples' pictures; attention and words only with ``everything``."""

    def scores(self, tokens: Tensor) -> Tensor:
        """``[n, vocabulary]``: what the model would say next at ``[n, d]`` states of any layer, through its final norm
        and output layer."""

    def text_loss(self, passages: Sequence[Tensor]) -> tuple[float, int]:
        """Cross-entropy (nats) of the next tokens of passages ``[t]`` without a picture: their sum and number."""

    def token_ids(self, words: str) -> list[int]:
        """The tokens of some text, without special ones."""

    def shown(self, sample: DiagnosticSample) -> Image:
        """The picture on which the grid of its patches lies: cut, padded and resized."""

    def word(self, token: int) -> str:
        """A token's text."""

    def describe(self) -> dict[str, Any]:
        """What the results should tell of the model."""


def attention_mass(weights: Tensor, is_visual: Tensor, is_asking: Tensor) -> Tensor:
    """The attention that text pays to the picture: summed over visual keys, averaged over asking queries.

    Args:
        weights: ``[B, heads, Q, K]`` attention probabilities.
        is_visual: ``[B, K]`` keys that are visual tokens.
        is_asking: ``[B, Q]`` queries that are text after the picture.

    Returns:
        ``[B, heads]``, between 0 and 1; nan in a row without such text.
    """
    on_picture = (weights.double() * is_visual[:, None, None]).sum(3)
    asking = is_asking[:, None].double()
    return (on_picture * asking).sum(2) / asking.sum(2)


def asking_tokens(is_visual: Tensor, is_text: Tensor) -> Tensor:
    """Boolean ``[B, S]``: text after the last visual token of its row."""
    visual_to_come = is_visual.flip(1).cumsum(1).flip(1)
    return is_text & (visual_to_come == 0)


def token_classes(
    masks: Sequence[Tensor | None], grids: Sequence[Grid], sizes: Sequence[int], background: int | None
) -> Tensor | None:
    """The class ``[n]`` of every visual token of several pictures.

    Args:
        masks: of each picture, ``[patches, pixels, 3]``: grey value, 255 inside the picture, and the object's number;
            None without masks.
        sizes: visual tokens of each picture.
    """
    rows = []
    for mask, grid, size in zip(masks, grids, sizes, strict=True):
        if mask is None:
            return None
        labelled = (mask[..., 1] == 255) & (mask[..., 0] != UNLABELLED)
        classes = torch.full((size,), NOTHING)
        pixels = torch.where(labelled, mask[..., 0].long(), NOTHING)
        classes[grid.first : grid.first + grid.size] = patch_classes(pixels, background)
        rows.append(classes)
    return torch.cat(rows)


def instance_patches(masks: Sequence[Tensor | None]) -> list[Tensor]:
    """Objects' numbers from each picture's mask ``[patches, pixels, 3]``, 0 where a processor has padded."""
    return [torch.where(mask[..., 1] == 255, mask[..., 2].long(), 0) for mask in masks if mask is not None]


def square_patches(mask: Tensor, rows: int, columns: int) -> Tensor:
    """``[rows * columns, pixels, channels]`` of a picture ``[channels, H, W]``, row by row."""
    channels, height, width = mask.shape
    blocks = mask[:, : height - height % rows, : width - width % columns]
    blocks = blocks.reshape(channels, rows, height // rows, columns, width // columns)
    return blocks.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1, channels)
