"""What terms ask of a model and of whatever trains it: the one seam between objectives and a training framework.

Nothing in :mod:`nemo_pre.terms` and in an objective's own files imports Lightning or NeMo. Another framework runs them
all by offering a :class:`Training`, whose chunks are :class:`VisualChunk`, and by calling a term's methods when they
are due (:class:`nemo_pre.terms.term.Term` says when). There are two: NeMo's callbacks
(:mod:`nemo_pre.callbacks.term_callback`), and :mod:`nemo_pre.core` for a loop of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from nemo_pre.parallel.micro_batch import BranchStates, MicroBatch, VisualTokens
    from nemo_pre.parallel.sequence_layout import Grid

MicroBatchListener = Callable[["MicroBatch"], None]
VisualTokensListener = Callable[["VisualChunk", "MicroBatch", "VisualTokens"], None]
BranchListener = Callable[["VisualChunk", "MicroBatch", "BranchStates", Tensor], Tensor]


class Training(Protocol):
    """What trains: on this rank, at this moment."""

    @property
    def chunks(self) -> Sequence[VisualChunk]:
        """The unwrapped model chunks of this rank, in the order of their virtual pipeline stages."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps done."""

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""


class ModelPart(Protocol):
    """What a term adds to the model before it is built: heads, averages, mask tokens."""

    def parts(self) -> dict[str, nn.Module | Tensor]:
        """The whole model's added modules and parameters, newly built, by the names they get in the model."""

    def add_to(self, chunk: VisualChunk) -> None:
        """Give a chunk that is being built those that belong to it."""


class Branch(Protocol):
    """The second sequence beside the samples, as a chunk runs it."""

    def mask_token(self) -> Tensor:
        """The embedding ``[d]`` that the student sees in a masked place, on the first stage."""

    def run_teacher(self, branch: Tensor, structure: Tensor | None, rotary: Tensor | None) -> Tensor:
        """The unmasked branch ``[L, B, d]`` through the teacher's part of this chunk, without a graph."""


class VisualModelConfig(Protocol):
    """The configuration of the whole model, of which a term may ask for parts before it is built.

    Attributes:
        language_transformer_config: Megatron's, of the decoder.
        vision_transformer_config: the tower's, with ``image_mean`` and ``image_std`` of the pixels it is fed.
        vision_projection_config: the projector's, with ``input_size`` and ``configure_model()``.
        decoder_layers: layers of the whole decoder, as users count them.
        parts: what terms add, each by a name of its own, in the order in which chunks are given it.
        branch: whether a second sequence runs beside the samples.
        whole_images: whether micro-batches say how images that ranks cut are brought together.
        mixed_attention: whether visual tokens of an image see each other both ways, and sequences are kept apart.
    """

    language_transformer_config: Any
    vision_transformer_config: Any
    vision_projection_config: Any

    @property
    def decoder_layers(self) -> int: ...

    parts: dict[str, ModelPart]
    branch: bool
    whole_images: bool
    mixed_attention: bool
    sequence_parallel: bool
    calculate_per_token_loss: bool
    grad_scale_func: Any
    params_dtype: Any
    bf16: bool
    fp16: bool


class VisualChunk(Protocol):
    """One chunk of the model on this rank, a ``torch.nn.Module``.

    Attributes:
        config: of the whole model.
        pre_process: whether the encoder, the projector and the embedding belong to it.
        post_process: whether the output layer does.
        language_model: its part of the decoder (Megatron's ``GPTModel`` or ``HybridModel``).
        vision_projection: the projector, on the first stage.
        on_micro_batch: called when a micro-batch enters this chunk.
        on_visual_tokens: called on the first stage with each micro-batch's visual tokens.
        on_branch: called on the last stage with the branch's final states and the chunk's output, which they return.
        branch: how it runs a second sequence; None without one.
        micro_batch: the micro-batch of the latest forward pass.
        observed: whether listeners and taps see forward passes.
        tile_tokens: visual tokens of an image tile, with native resolution the most of an image.
    """

    config: Any
    pre_process: bool
    post_process: bool
    language_model: Any
    vision_projection: Any
    on_micro_batch: list[MicroBatchListener]
    on_visual_tokens: list[VisualTokensListener]
    on_branch: list[BranchListener]
    branch: Branch | None
    micro_batch: MicroBatch | None
    observed: bool

    @property
    def tile_tokens(self) -> int: ...

    def image_tiles(self, tiles_per_image: Sequence[int], grids: Sequence[Grid] | None) -> list[list[Grid]]:
        """The tiles of each image, as rows and columns of visual tokens."""

    def padded_length(self, longest: int) -> int:
        """The length a batch whose longest sample has ``longest`` tokens is padded or cut to."""

    def sharded_length(self, longest: int) -> int:
        """``longest`` rounded up so that all ranks have the same share of a sequence, at least one token."""

    def decoder_layer(self, number: int) -> nn.Module | None:
        """The decoder layer with this 1-based number in the whole model, if this chunk has it."""

    def parameters(self) -> Any: ...
