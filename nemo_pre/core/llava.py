"""Megatron-Core's ``LLaVAModel`` as terms see a chunk, from outside: by hooks, without a change to its code.

Its forward pass takes no micro-batch of ours. A chunk runs a step's micro-batches in ascending order, under every
schedule, so the pass says which one it is by its number.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.core import parallel_state as ps
from torch import Tensor, nn

from nemo_pre.core.foreign import ForeignChunk
from nemo_pre.neva.blocks import block_output, num_blocks
from nemo_pre.parallel.auxiliary_gradient import scale_gradient
from nemo_pre.parallel.micro_batch import MicroBatch, VisualTokens
from nemo_pre.parallel.sequence_layout import (
    IMAGE_TOKEN_INDEX,
    Grid,
    combined_lengths,
    sequence_layout,
    square_tiles,
)
from nemo_pre.parallel.token_streams import StreamShape
from nemo_pre.terms.step_planner import LANGUAGE_MODEL
from nemo_pre.terms.training import Branch, BranchListener, MicroBatchListener, ModelPart, VisualTokensListener

# What the model's constructor can be told under which the place of a visual token is not what is worked out here.
REFUSED = {
    "_tile_tags": "tile_tags",
    "dynamic_resolution": "dynamic_resolution",
    "sound_model": "sound_model",
    "separate_video_embedder": "separate_video_embedder",
}
IMAGES, TOKENS = "images", "input_ids"  # of the arguments of its forward pass, the first two


@dataclass
class LLaVAConfig:
    """The configuration of a ``LLaVAModel`` as terms see it (:class:`nemo_pre.terms.training.VisualModelConfig`)."""

    language_transformer_config: Any
    vision_transformer_config: Any
    vision_projection_config: Any
    decoder_layers: int
    parts: dict[str, ModelPart] = field(default_factory=dict)
    branch: bool = False
    whole_images: bool = False
    mixed_attention: bool = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of copying, before there is a configuration
            raise AttributeError(name)
        return getattr(self.language_transformer_config, name)


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

    What is asked of it and it does not know is asked of the model; modules that are given to it become the model's, so
    that DDP, optimizer and checkpoints find them there.

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
        own = vars(self)
        own["model"] = model
        own["config"] = LLaVAConfig(
            model.config,
            Pixels(image_mean, image_std),
            Projector(model.vision_projection, encoder_width),
            num_blocks(model.language_model if _is_hybrid(model) else model.config),
        )
        own["pre_process"], own["observed"] = model.add_encoder, False
        own["on_micro_batch"] = list[MicroBatchListener]()
        own["on_visual_tokens"] = list[VisualTokensListener]()
        own["on_branch"] = list[BranchListener]()
        own["branch"] = None
        own["micro_batch"] = None
        own["_planned"], own["_images"] = [], None
        own["_handles"] = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]
        if model.add_encoder:
            own["_handles"].append(model.vision_projection.register_forward_hook(self._projected))

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
    model: Any
    _planned: list[dict[str, Any]]
    _images: Tensor | None
    _handles: list[Any]

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet
            raise AttributeError(name)
        return getattr(vars(self)["model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter):
            setattr(self.model, name, value)
        else:
            vars(self)[name] = value

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()

    # --- what terms ask ---------------------------------------------------------------------------------------------

    @property
    def tile_tokens(self) -> int:
        return int(self.model.img_seq_len)

    def image_tiles(self, tiles_per_image: Sequence[int], grids: Sequence[Grid] | None) -> list[list[Grid]]:
        return square_tiles(tiles_per_image, self.tile_tokens)

    def padded_length(self, longest: int) -> int:
        maximum = int(self.model._language_max_sequence_length)
        return maximum if self.model._language_is_pipeline_parallel else min(longest, maximum)

    def sharded_length(self, longest: int) -> int:
        raise NotImplementedError(f"{self.kind} runs no second sequence")

    def decoder_layer(self, number: int) -> nn.Module | None:
        return block_output(self.model.language_model, number)

    def parameters(self) -> Any:
        return self.model.parameters()

    # --- a step's forward passes ------------------------------------------------------------------------------------

    def start_step(self, batches: Sequence[dict[str, Any]]) -> None:
        self._planned = list(batches)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.observed:
            return
        if kwargs.get("packed_seq_params") is not None:
            raise ValueError(f"{self.kind} was given packed_seq_params, and objectives do not know packed rows of it.")
        given = dict(zip((IMAGES, TOKENS), args, strict=False)) | kwargs
        if not self._planned:
            raise ValueError(
                "The model runs more micro-batches than Objectives.start_step was given: give it all of a step, and "
                "call end_step before other forward passes."
            )
        batch = self._planned.pop(0)
        tokens = batch["tokens"]
        if given[TOKENS] is not None and tuple(given[TOKENS].shape) != tuple(tokens.shape):
            raise ValueError(
                f"The model runs a micro-batch of {list(given[TOKENS].shape)} tokens where Objectives.start_step was "
                f"given one of {list(tokens.shape)}: run a step's micro-batches in the order in which it got them."
            )
        micro_batch = self._as_the_model_lays_it_out(batch)
        self.micro_batch = micro_batch
        self._images = given.get(IMAGES)
        for enter in self.on_micro_batch:
            enter(micro_batch)
        if self.pre_process and (self._images is None or not len(self._images)):
            some = next(self.model.vision_projection.parameters())
            width, d = self.config.vision_projection_config.input_size, self.model.config.hidden_size
            self._receive(VisualTokens(some.new_zeros(0, width), some.new_zeros(0, d), None))

    def _as_the_model_lays_it_out(self, batch: dict[str, Any]) -> MicroBatch:
        """The planned micro-batch on this rank. Without pipelining the model pads each to its own longest sample."""
        micro_batch: MicroBatch = batch["micro_batch"]
        tiles = micro_batch.layout.image_tiles
        length = self.padded_length(int(combined_lengths(batch["tokens"], tiles, IMAGE_TOKEN_INDEX).max()))
        if length != micro_batch.layout.sequence_length:
            layout = sequence_layout(batch["tokens"], tiles, IMAGE_TOKEN_INDEX, length)
            micro_batch = replace(micro_batch, layout=layout)
        if self.pre_process and batch.get("targets"):
            targets = {name: features.cuda(non_blocking=True) for name, features in batch["targets"].items()}
            micro_batch = replace(micro_batch, targets=targets)
        sequence_parallel = self.model.sequence_parallel_lm
        shape = StreamShape(
            mixed_attention=False,
            rope="1d",
            tp_size=ps.get_tensor_model_parallel_world_size() if sequence_parallel else 1,
            cp_size=ps.get_context_parallel_world_size(),
            cp_rank=ps.get_context_parallel_rank(),
        )
        tp_rank = ps.get_tensor_model_parallel_rank() if sequence_parallel else 0
        return micro_batch.on_this_rank(shape, tp_rank, True, self.pre_process, self.config.whole_images)

    def _projected(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        """The projector ran: ``[tile_tokens, num_tiles, d_vision]`` to ``[tile_tokens, num_tiles, d]``."""
        if not self.observed:
            return
        tokens = output[0] if isinstance(output, tuple) else output
        features = inputs[0].transpose(0, 1).flatten(0, 1)
        self._receive(VisualTokens(features, tokens.transpose(0, 1).flatten(0, 1), self._images))

    def _receive(self, visual: VisualTokens) -> None:
        micro_batch = self.micro_batch
        assert micro_batch is not None
        visual.targets = {name: stored.flatten(0, 1) for name, stored in micro_batch.targets.items()}
        for receive in self.on_visual_tokens:
            receive(self, micro_batch, visual)

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The weight of the language model's loss, on the last stage."""
        if not (self.observed and self.model.post_process):
            return output
        assert self.micro_batch is not None
        losses, mask = output
        return scale_gradient(losses, self.micro_batch.plan.weights[LANGUAGE_MODEL]), mask


def _is_hybrid(model: Any) -> bool:
    return getattr(model.language_model, "hybrid_layer_pattern", None) is not None
