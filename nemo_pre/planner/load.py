"""The tokens of a micro-batch as one rank sees them: the largest the config allows."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pre.config.derived import num_visual_tokens, sample_text_width
from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.cost import BranchLoad
from nemo_pre.objectives.registry import enabled

FLOAT, INDEX = 4, 8  # bytes of a float32 and of an int64


@dataclass(frozen=True)
class Load:
    """A micro-batch whose rows have the full length.

    Attributes:
        rows: samples, or packed rows.
        length: tokens of a row, text and images.
        text: text tokens of a row.
        text_width: width of the tensors that hold the text, with their padding.
        images: images of a row.
        tiles: tiles of all images of a row: what the encoder runs on.
        tile_tokens: visual tokens of a tile in the decoder.
        branch: tokens per row of the second sequence that an objective runs beside the samples, 0 without one.
        masked: visual tokens of a row that are masked there.
        branch_is_whole: it is each sample again with its text, rather than its images, each by itself.
        replicas: ranks a sequence is cut over by context parallelism.
        shards: ranks it is cut over by sequence parallelism.
    """

    rows: int
    length: int
    text: int
    text_width: int
    images: int
    tiles: int
    tile_tokens: int
    branch: int
    masked: int
    branch_is_whole: bool
    replicas: int
    shards: int

    @property
    def visual(self) -> int:
        """Number of visual tokens of a row."""
        return min(self.tiles * self.tile_tokens, self.length)

    @property
    def ranks(self) -> int:
        """Number of ranks that a sequence is cut over."""
        return self.replicas * self.shards

    @property
    def keys(self) -> int:
        """Number of tokens of a row that attention sees: both sequences of all context ranks."""
        return self.length + self.branch

    @property
    def queries(self) -> int:
        """Number of tokens of a row on a context rank, both sequences."""
        return self.keys // self.replicas

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows on a context rank, both sequences: between tensor-parallel matrices."""
        return self.rows * self.queries

    @property
    def sharded(self) -> int:
        """Number of tokens of all rows on a rank where sequence parallelism cuts them: at norms and residuals."""
        return self.tokens // self.shards

    @property
    def sample_tokens(self) -> int:
        """Number of tokens of all rows on a context rank, the samples' alone: at the logits."""
        return self.rows * self.length // self.replicas

    def on_fullest_rank(self, tokens_of_row: int, length: int) -> int:
        """How many of ``tokens_of_row`` tokens, lying anywhere in rows of ``length``, one rank can have."""
        return self.rows * min(tokens_of_row, length // self.replicas // self.shards)


def largest_load(config: RunConfig, images_per_row: int | None = None) -> Load:
    """The largest micro-batch: full rows, each with ``images_per_row`` images of ``data.max_tiles`` tiles, with
    native resolution of the most visual tokens an image may have.

    Args:
        images_per_row: None: one, or with packing as many as leave a text token to each.
    """
    data, layout = config.data, config.parallel
    shards = layout.tensor if layout.sequence else 1
    factor = (2 * layout.context if layout.context > 1 else 1) * shards
    tile_tokens = num_visual_tokens(config.model)
    if images_per_row is None:
        images_per_row = max(data.sequence_length // (data.max_tiles * tile_tokens + 1), 1) if data.packing else 1
    tiles = images_per_row * data.max_tiles
    visual = min(tiles * tile_tokens, data.sequence_length)
    branch = _branch(config, visual, factor)
    return Load(
        rows=config.trainer.micro_batch_size,
        length=data.sequence_length,
        text=max(data.sequence_length - visual, 0) + images_per_row,
        text_width=data.sequence_length if data.packing else sample_text_width(config.model, data.sequence_length),
        images=images_per_row,
        tiles=tiles,
        tile_tokens=tile_tokens,
        branch=branch.tokens,
        masked=branch.masked,
        branch_is_whole=branch.whole,
        replicas=layout.context,
        shards=shards,
    )


def _branch(config: RunConfig, visual: int, multiple: int) -> BranchLoad:
    """Size of the second sequence of the objective that has one."""
    for objective in enabled(config):
        cost = objective.build_cost()
        branch = cost.branch(visual, config.data.sequence_length, multiple) if cost is not None else None
        if branch is not None:
            return branch
    return BranchLoad(tokens=0, masked=0, whole=False)


def activation_bytes(config: RunConfig) -> int:
    """Bytes of an activation, and of a weight that computes."""
    return FLOAT if config.precision.name == "fp32" else 2


def uses_token_structure(config: RunConfig) -> bool:
    """Whether attention is the project's own, which is told what each token may see."""
    return config.model.attention == "mixed" or config.data.packing


def has_explicit_positions(config: RunConfig, load: Load) -> bool:
    """Whether every token is told its rotary position."""
    return config.model.rope != "1d" or load.branch > 0 or config.data.packing


def attends_densely(config: RunConfig) -> bool:
    """Whether attention on a GPU computes every pair of tokens and masks it afterwards: Transformer Engine has no
    kernel for float32."""
    return config.precision.name == "fp32" and not uses_token_structure(config)
