"""Where text and visual tokens lie in the combined sequence, on every rank, without communication.

Every rank of a replica reads the same samples, so every rank can work out, from the token ids alone, which
positions of the combined sequence are visual and which visual token each one holds. Only the first pipeline
stage ever has the embeddings themselves.

Shape suffixes: B micro-batch, T text tokens (an image is one token), S combined sequence, L its local shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from nemo_pre.device_copies import to_device

IMAGE_TOKEN_INDEX = -200  # NeVA's token id of an image
IGNORE_INDEX = -100  # NeVA's label of a token that is not predicted

Grid = tuple[int, int]  # height and width of a tile in visual tokens
ImageTiles = Sequence[Sequence[Grid]]


@dataclass(frozen=True)
class SequenceLayout:
    """The combined sequence of one micro-batch.

    Attributes:
        text_source_BS: index along T of the text token at each position, -1 where there is none.
        visual_source_BS: index of the visual token at each position, -1 where there is none. Visual tokens are
            numbered through the micro-batch: sample by sample, image by image, tile by tile, patch by patch.
        visual_image_BS: index of the image a visual token belongs to, -1 where there is none.
        segment_BS: number of the packed sample in its row, 0 where rows are not packed, and at padding.
        num_visual_tokens: visual tokens left after truncation.
        num_images: images with at least one token left after truncation.
        image_tiles: of every image, before truncation, the height and width of its tiles in visual tokens.
    """

    text_source_BS: Tensor
    visual_source_BS: Tensor
    visual_image_BS: Tensor
    segment_BS: Tensor
    num_visual_tokens: int
    num_images: int
    image_tiles: ImageTiles

    @property
    def sequence_length(self) -> int:
        return self.text_source_BS.shape[1]

    def to(self, device: torch.device | str | int) -> SequenceLayout:
        return SequenceLayout(
            to_device(self.text_source_BS, device),
            to_device(self.visual_source_BS, device),
            to_device(self.visual_image_BS, device),
            to_device(self.segment_BS, device),
            self.num_visual_tokens,
            self.num_images,
            self.image_tiles,
        )

    @property
    def tokens_per_image(self) -> list[int]:
        """Visual tokens of every image, before truncation."""
        return _tokens_per_image(self.image_tiles)

    @property
    def grids_T2(self) -> Tensor:
        """Height and width of every tile, before truncation."""
        return torch.tensor([grid for tiles in self.image_tiles for grid in tiles], dtype=torch.int64).view(-1, 2)


def square_tiles(tiles_per_image: Sequence[int], tile_tokens: int) -> list[list[Grid]]:
    """Tiles of a fixed number of visual tokens: squares of them, or where a class token is among them a row."""
    side = isqrt(tile_tokens)
    grid = (side, side) if side * side == tile_tokens else (1, tile_tokens)
    return [[grid] * tiles for tiles in tiles_per_image]


def combined_lengths(tokens_BT: Tensor, image_tiles: ImageTiles, image_token: int) -> Tensor:
    """Length ``[B]`` of each sample once every image token is replaced by its visual tokens."""
    return _token_lengths(tokens_BT, image_tiles, image_token).sum(dim=1)


def sequence_layout(
    tokens_BT: Tensor,
    image_tiles: ImageTiles,
    image_token: int,
    sequence_length: int,
    segments_BT: Tensor | None = None,
) -> SequenceLayout:
    """Lay a micro-batch out: text tokens in order, each image token replaced by its tiles' visual tokens, right-padded
    or cut to ``sequence_length``.

    Args:
        tokens_BT: token ids, ``image_token`` standing for one image.
        image_tiles: the tiles of each image, in the order their tokens appear in ``tokens_BT``.
        image_token: the id that stands for an image.
        sequence_length: S.
        segments_BT: number of the packed sample each token belongs to; None: a row is a sample.

    Raises:
        ValueError: if the number of image tokens and of images differ.
    """
    batch, num_text = tokens_BT.shape
    lengths_BT = _token_lengths(tokens_BT, image_tiles, image_token)
    ends_BT = lengths_BT.cumsum(dim=1)
    full_length = max(int(ends_BT[:, -1].max()) if num_text else 0, sequence_length)

    is_image_BT = tokens_BT == image_token
    image_index_BT = is_image_BT.reshape(-1).cumsum(0).reshape(batch, num_text) - 1

    text_source = torch.full((batch, full_length), -1, dtype=torch.int64)
    visual_image = torch.full((batch, full_length), -1, dtype=torch.int64)
    token_of_position = torch.searchsorted(
        ends_BT, torch.arange(full_length).expand(batch, full_length).contiguous(), right=True
    )
    inside = token_of_position < num_text
    token_of_position = token_of_position.clamp(max=num_text - 1)
    on_image = is_image_BT.gather(1, token_of_position) & inside
    text_source = torch.where(inside & ~on_image, token_of_position, text_source)
    visual_image = torch.where(on_image, image_index_BT.gather(1, token_of_position), visual_image)
    # Numbered before the cut, so that a cut image keeps the numbers its tokens have in the encoder's output.
    visual_source = torch.where(on_image, on_image.reshape(-1).cumsum(0).reshape(on_image.shape) - 1, -1)
    segment = torch.zeros_like(text_source)
    if segments_BT is not None:
        segment = torch.where(inside, segments_BT.gather(1, token_of_position), segment)

    text_source, visual_source, visual_image, segment = (
        tensor[:, :sequence_length].contiguous() for tensor in (text_source, visual_source, visual_image, segment)
    )
    return SequenceLayout(
        text_source,
        visual_source,
        visual_image,
        segment,
        num_visual_tokens=int((visual_source >= 0).sum()),
        num_images=int(visual_image[visual_image >= 0].unique().numel()),
        image_tiles=tuple(map(tuple, image_tiles)),
    )


def expand_labels(
    layout: SequenceLayout, labels_BT: Tensor, loss_mask_BT: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Labels and loss mask on the combined sequence, ``[B, S]`` each.

    A visual token and the text token just before an image of its sample have no loss: the one predicts no word, the
    other would have to predict an image. Labels are already shifted (``labels[t]`` is what follows token ``t``).
    """
    is_text_BS = layout.text_source_BS >= 0
    source = layout.text_source_BS.clamp(min=0)
    labels_BS = torch.where(is_text_BS, labels_BT.gather(1, source), ignore_index)
    loss_mask_BS = torch.where(is_text_BS, loss_mask_BT.gather(1, source), 0)
    next_is_visual = torch.zeros_like(is_text_BS)
    same_sample = layout.segment_BS[:, 1:] == layout.segment_BS[:, :-1]
    next_is_visual[:, :-1] = (layout.visual_source_BS[:, 1:] >= 0) & same_sample
    return labels_BS, loss_mask_BS.masked_fill(next_is_visual, 0)


@dataclass(frozen=True)
class TokenPlaces:
    """Where tokens go in the combined sequence.

    Attributes:
        row, column: ``[n]`` the place of each in ``[B, S]``.
        source: ``[n]`` its index: of a text token along T, of a visual token in the micro-batch.
    """

    row: Tensor
    column: Tensor
    source: Tensor

    @classmethod
    def of(cls, source_BS: Tensor) -> TokenPlaces:
        """The places of the tokens that a layout names, row by row; -1 where there is none."""
        row, column = torch.where(source_BS >= 0)
        return cls(row, column, source_BS[row, column])

    def to(self, device: torch.device | str | int) -> TokenPlaces:
        return TokenPlaces(*(to_device(tensor, device) for tensor in (self.row, self.column, self.source)))


@dataclass(frozen=True)
class CombinedPlaces:
    """Where every token of a micro-batch goes in its whole combined sequence, as numbers.

    The layout says it too, as masks; but how many tokens a mask chooses is not known before it is counted, and what is
    counted on a device the host waits for.

    Attributes:
        image: ``[n]`` image of each visual token, as in :class:`LocalVisualTokens`.
    """

    text: TokenPlaces
    visual: TokenPlaces
    image: Tensor

    def to(self, device: torch.device | str | int) -> CombinedPlaces:
        return CombinedPlaces(self.text.to(device), self.visual.to(device), to_device(self.image, device))


def combined_places(layout: SequenceLayout) -> CombinedPlaces:
    """The places of a layout's tokens; on the CPU."""
    visual = TokenPlaces.of(layout.visual_source_BS)
    image = _images_that_are_left(layout)[layout.visual_image_BS[visual.row, visual.column]]
    return CombinedPlaces(TokenPlaces.of(layout.text_source_BS), visual, image)


@dataclass(frozen=True)
class LocalVisualTokens:
    """The visual tokens that lie in this rank's shard of the sequence.

    Attributes:
        position: ``[n]`` index into ``hidden_states.reshape(L * B, hidden)``.
        source: ``[n]`` index of the visual token in the micro-batch.
        image: ``[n]`` number of its image, below the layout's ``num_images``: only images with a token left count.
    """

    position: Tensor
    source: Tensor
    image: Tensor

    def to(self, device: torch.device | str | int) -> LocalVisualTokens:
        return LocalVisualTokens(*(to_device(tensor, device) for tensor in (self.position, self.source, self.image)))


def local_positions(sequence_length: int, tp_size: int, tp_rank: int, cp_size: int, cp_rank: int) -> Tensor:
    """Positions ``[L]`` of the combined sequence on this rank, in the order its hidden states hold them.

    Context parallelism gives rank ``r`` the chunks ``r`` and ``2 * cp_size - 1 - r`` of ``2 * cp_size`` (zigzag,
    so that causal attention is balanced), as ``megatron.core.utils.get_batch_on_this_cp_rank`` cuts; sequence
    parallelism cuts what is left into ``tp_size`` runs. Pass ``tp_size=1`` without sequence parallelism.

    Raises:
        ValueError: the sequence cannot be cut into two chunks per context rank.
    """
    positions = torch.arange(sequence_length)
    if cp_size > 1:
        if sequence_length % (2 * cp_size):
            raise ValueError(
                f"A sequence of {sequence_length} tokens cannot be cut into {2 * cp_size} chunks: pad it to a "
                f"multiple of 2 x context parallel size."
            )
        chunks = positions.view(2 * cp_size, -1)
        positions = torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])
    return positions.view(tp_size, -1)[tp_rank]


def local_visual_tokens(layout: SequenceLayout, positions_L: Tensor) -> LocalVisualTokens:
    """Select the visual tokens of this rank's shard, in the order of the flattened hidden states."""
    source_LB = layout.visual_source_BS[:, positions_L].transpose(0, 1)
    image_LB = layout.visual_image_BS[:, positions_L].transpose(0, 1)
    position = (source_LB.reshape(-1) >= 0).nonzero().squeeze(1)
    image = _images_that_are_left(layout)[image_LB.reshape(-1)[position]]
    return LocalVisualTokens(position, source_LB.reshape(-1)[position], image)


def _images_that_are_left(layout: SequenceLayout) -> Tensor:
    """Number of each image among those with a token left after truncation; of no meaning for the others."""
    image = layout.visual_image_BS[layout.visual_image_BS >= 0]
    return torch.bincount(image).clamp(max=1).cumsum(0) - 1


def _tokens_per_image(image_tiles: ImageTiles) -> list[int]:
    return [sum(height * width for height, width in tiles) for tiles in image_tiles]


def _token_lengths(tokens_BT: Tensor, image_tiles: ImageTiles, image_token: int) -> Tensor:
    is_image_BT = tokens_BT == image_token
    num_image_tokens = int(is_image_BT.sum())
    if num_image_tokens != len(image_tiles):
        raise ValueError(
            f"A micro-batch has {num_image_tokens} image tokens but {len(image_tiles)} images: every image needs "
            f"one image token (id {image_token}) in its sample's text."
        )
    lengths_BT = torch.ones_like(tokens_BT)
    lengths_BT[is_image_BT] = torch.tensor(_tokens_per_image(image_tiles), dtype=tokens_BT.dtype)
    return lengths_BT
