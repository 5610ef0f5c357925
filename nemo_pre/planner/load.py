"""The tokens of a micro-batch as one rank sees them: the largest the config allows."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pre.config.derived import num_visual_tokens
from nemo_pre.config.schema import RunConfig


@dataclass(frozen=True)
class Load:
    """A micro-batch whose rows have the full length.

    Attributes:
        rows: samples, or packed rows.
        length: tokens of a row, text and images.
        text: text tokens of a row.
        images: images of a row.
        tiles: tiles of all images of a row: what the encoder runs on.
        tile_tokens: visual tokens of a tile in the decoder.
        branch: tokens of LaVer's second sequence per row, 0 without one.
        masked: visual tokens of a row that LaVer masks.
        replicas: ranks a sequence is cut over by context parallelism.
        shards: ranks it is cut over by sequence parallelism.
    """

    rows: int
    length: int
    text: int
    images: int
    tiles: int
    tile_tokens: int
    branch: int
    masked: int
    replicas: int
    shards: int

    @property
    def visual(self) -> int:
        """Visual tokens of a row."""
        return min(self.tiles * self.tile_tokens, self.length)

    @property
    def keys(self) -> int:
        """Tokens of a row that attention sees: both sequences of all context ranks."""
        return self.length + self.branch

    @property
    def queries(self) -> int:
        """Tokens of a row on a context rank, both sequences."""
        return self.keys // self.replicas

    @property
    def tokens(self) -> int:
        """Tokens of all rows on a context rank, both sequences: between tensor-parallel matrices."""
        return self.rows * self.queries

    @property
    def sharded(self) -> int:
        """The same where sequence parallelism cuts them: at norms and residuals."""
        return self.tokens // self.shards

    @property
    def sample_tokens(self) -> int:
        """Tokens of all rows on a context rank, the samples' alone: at the logits."""
        return self.rows * self.length // self.replicas

    def on_fullest_rank(self, tokens_of_row: int, length: int) -> int:
        """Of ``tokens_of_row`` tokens lying anywhere in rows of ``length``, how many one rank can have."""
        return self.rows * min(tokens_of_row, length // self.replicas // self.shards)


def largest_load(config: RunConfig, images_per_row: int | None = None) -> Load:
    """The largest micro-batch: full rows, each with ``images_per_row`` images of ``data.max_tiles`` tiles, with
    native resolution of the most visual tokens an image may have.

    Args:
        images_per_row: None: one, or with packing as many as leave a text token to each.
    """
    data, layout, laver = config.data, config.parallel, config.objective.laver
    shards = layout.tensor if layout.sequence else 1
    factor = (2 * layout.context if layout.context > 1 else 1) * shards
    tile_tokens = num_visual_tokens(config.model)
    if images_per_row is None:
        images_per_row = max(data.sequence_length // (data.max_tiles * tile_tokens + 1), 1) if data.packing else 1
    tiles = images_per_row * data.max_tiles
    visual = min(tiles * tile_tokens, data.sequence_length)
    branch = 0
    if laver.enabled:
        branch = data.sequence_length if laver.sequence == "whole" else -(-visual // factor) * factor
    return Load(
        rows=config.trainer.micro_batch_size,
        length=data.sequence_length,
        text=max(data.sequence_length - visual, 0) + images_per_row,
        images=images_per_row,
        tiles=tiles,
        tile_tokens=tile_tokens,
        branch=branch,
        masked=-int(-visual * laver.mask_ratio // 1) if laver.enabled else 0,
        replicas=layout.context,
        shards=shards,
    )


def uses_token_structure(config: RunConfig) -> bool:
    """Whether attention is the project's own, which is told what each token may see."""
    return config.model.attention == "mixed" or config.data.packing


def has_explicit_positions(config: RunConfig) -> bool:
    """Whether every token is told its rotary position."""
    return config.model.rope != "1d" or config.objective.laver.enabled or config.data.packing
