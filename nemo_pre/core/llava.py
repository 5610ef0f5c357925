"""Megatron-Core's ``LLaVAModel`` as terms see a chunk."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nemo_pre.core.foreign import ForeignChunk, ForeignConfig
from nemo_pre.neva.blocks import num_blocks
from nemo_pre.parallel.sequence_layout import IMAGE_TOKEN_INDEX, Grid, combined_lengths, square_tiles

# What the model's constructor can be told under which the place of a visual token is not what is worked out here.
REFUSED = {
    "_tile_tags": "tile_tags",
    "dynamic_resolution": "dynamic_resolution",
    "sound_model": "sound_model",
    "separate_video_embedder": "separate_video_embedder",
}
IMAGES, TOKENS = "images", "input_ids"  # of the arguments of its forward pass, the first two


@dataclass
class Projector:
    """The projector as terms ask for it.

    Attributes:
        projection: the projector; None but on the first stage.
        encoder_width: the width of an encoder's token, if somebody said it.
    """

    projection: nn.Module | None
    encoder_width: int | None

    @property
    def input_size(self) -> int:
        if self.encoder_width is not None:
            return self.encoder_width
        if self.projection is None:
            raise ValueError(
                "An objective compares with the encoder's features, whose width a pipeline stage without the encoder "
                "does not know: call Objectives.attach(chunks, encoder_width=...), on all stages alike."
            )
        return int(next(weight for weight in self.projection.parameters() if weight.ndim == 2).shape[1])

    def configure_model(self) -> nn.Module:
        """A copy that nobody listens to."""
        assert self.projection is not None
        return copy.deepcopy(self.projection, {id(self.projection._forward_hooks): OrderedDict()})


@dataclass
class Pixels:
    """How pixels were normalised for the encoder, if somebody said it."""

    mean: Sequence[float] | None
    std: Sequence[float] | None

    @property
    def image_mean(self) -> Sequence[float]:
        return self._known(self.mean)

    @property
    def image_std(self) -> Sequence[float]:
        return self._known(self.std)

    def _known(self, numbers: Sequence[float] | None) -> Sequence[float]:
        if numbers is None:
            raise ValueError(
                "An objective looks at pictures, and how their pixels were normalised is not known: call "
                "Objectives.attach(chunks, image_mean=[...], image_std=[...]) with a number for each colour."
            )
        return numbers


class LLaVAChunk(ForeignChunk):
    """One chunk of an unmodified ``LLaVAModel``.

    Args:
        model: the chunk.
        encoder_width: the width of an encoder's token; needed under pipelining by an objective that compares with it.
        image_mean, image_std: how pixels were normalised for the encoder, of each colour; needed by an objective that
            looks at pictures.

    Raises:
        ValueError: the model was built with an option that objectives do not know.
    """

    kind = "Megatron-Core's LLaVAModel"

    def __init__(
        self,
        model: Any,
        encoder_width: int | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        for attribute, option in REFUSED.items():
            if getattr(model, attribute, None):
                raise ValueError(
                    f"{self.kind} was built with {option}, with which objectives do not know where its visual tokens "
                    f"are: build it without."
                )
        config = ForeignConfig(
            model.config,
            Pixels(image_mean, image_std),
            Projector(model.vision_projection, encoder_width),
            num_blocks(model.language_model if _is_hybrid(model) else model.config),
        )
        super().__init__(model, config, model.add_encoder, model.sequence_parallel_lm)
        self._images: Tensor | None = None
        self.handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]
        if model.add_encoder:
            self.handles.append(model.vision_projection.register_forward_hook(self._projected))

    # --- what terms ask ---------------------------------------------------------------------------------------------

    @property
    def tile_tokens(self) -> int:
        return int(self.model.img_seq_len)

    def image_tiles(self, tiles_per_image: Sequence[int], grids: Sequence[Grid] | None) -> list[list[Grid]]:
        return square_tiles(tiles_per_image, self.tile_tokens)

    def padded_length(self, longest: int) -> int:
        maximum = int(self.model._language_max_sequence_length)
        return maximum if self.model._language_is_pipeline_parallel else min(longest, maximum)

    # --- a step's forward passes ------------------------------------------------------------------------------------

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.observed:
            return
        if kwargs.get("packed_seq_params") is not None:
            raise ValueError(f"{self.kind} was given packed_seq_params, and objectives do not know packed rows of it.")
        given = dict(zip((IMAGES, TOKENS), args, strict=False)) | kwargs
        batch = self.next_planned()
        tokens = batch["tokens"]
        if given[TOKENS] is not None and tuple(given[TOKENS].shape) != tuple(tokens.shape):
            raise ValueError(
                f"The model runs a micro-batch of {list(given[TOKENS].shape)} tokens where Objectives.start_step was "
                f"given one of {list(tokens.shape)}: run a step's micro-batches in the order in which it got them."
            )
        self._images = given.get(IMAGES)
        # Without pipelining the model pads each micro-batch to its own longest sample.
        tiles = batch["micro_batch"].layout.image_tiles
        self.enter(batch, self.padded_length(int(combined_lengths(tokens, tiles, IMAGE_TOKEN_INDEX).max())))
        if self.pre_process and (self._images is None or not len(self._images)):
            some = next(self.model.vision_projection.parameters())
            width, d = self.config.vision_projection_config.input_size, self.model.config.hidden_size
            self.receive(some.new_zeros(0, width), some.new_zeros(0, d), None)

    def _projected(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        """The projector ran: ``[tile_tokens, num_tiles, d_vision]`` to ``[tile_tokens, num_tiles, d]``."""
        if not self.observed:
            return
        tokens = output[0] if isinstance(output, tuple) else output
        features = inputs[0].transpose(0, 1).flatten(0, 1)
        self.receive(features, tokens.transpose(0, 1).flatten(0, 1), self._images)

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The weight of the language model's loss, on the last stage."""
        if not (self.observed and self.model.post_process):
            return output
        losses, mask = output
        return self.weighted(losses), mask


def _is_hybrid(model: Any) -> bool:
    return getattr(model.language_model, "hybrid_layer_pattern", None) is not None
