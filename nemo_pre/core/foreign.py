"""A chunk of somebody else's model, as terms see it: from outside, by hooks, without a change to its code.

Its forward pass takes no micro-batch of ours. A chunk runs a step's micro-batches in ascending order, under every
schedule, so a pass says which one it is by its number in the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.core import parallel_state as ps
from torch import Tensor, nn

from nemo_pre.neva.blocks import block_output
from nemo_pre.parallel.auxiliary_gradient import scale_gradient
from nemo_pre.parallel.micro_batch import MicroBatch, VisualTokens
from nemo_pre.parallel.sequence_layout import IMAGE_TOKEN_INDEX, sequence_layout
from nemo_pre.parallel.token_streams import StreamShape
from nemo_pre.terms.step_planner import LANGUAGE_MODEL
from nemo_pre.terms.training import (
    Branch,
    BranchListener,
    MicroBatchListener,
    ModelPart,
    VisualChunk,
    VisualTokensListener,
)


@dataclass
class ForeignConfig:
    """The configuration of somebody else's model as terms see it; what it does not know, its decoder's does.

    Attributes: see :class:`nemo_pre.terms.training.VisualModelConfig`.
    """

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


class ForeignChunk(VisualChunk):
    """A chunk of somebody else's model, which knows nothing of micro-batches' plans.

    What is asked of it and it does not know is asked of the model; modules that are given to it become the model's, so
    that DDP, optimizer and checkpoints find them there. A subclass registers its hooks in ``handles``, calls
    :meth:`enter` when a forward pass begins, :meth:`receive` when visual tokens are there and :meth:`weighted` when
    losses are, and says :meth:`image_tiles` and :meth:`padded_length`.

    Args:
        model: the chunk; its part of the decoder is ``language_model``.
        config: of the whole model.
        pre_process: encoder, projector and embedding belong to it.
        sequence_parallel: the decoder's tokens are cut over tensor-parallel ranks.

    Attributes:
        kind: the model's name, in sentences.
    """

    kind: str
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
    handles: list[Any]

    def __init__(self, model: Any, config: ForeignConfig, pre_process: bool, sequence_parallel: bool) -> None:
        own = vars(self)
        own["model"], own["config"], own["pre_process"] = model, config, pre_process
        self.on_micro_batch, self.on_visual_tokens, self.on_branch = [], [], []
        self.branch = self.micro_batch = None
        self.observed, self.handles = False, []
        self._sequence_parallel = sequence_parallel
        self._planned: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet
            raise AttributeError(name)
        return getattr(vars(self)["model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter):
            setattr(self.model, name, value)
        else:
            vars(self)[name] = value

    @property
    def tile_tokens(self) -> int:
        raise NotImplementedError(f"{self.kind} has no tiles of one size")

    def sharded_length(self, longest: int) -> int:
        raise NotImplementedError(f"{self.kind} runs no second sequence")

    def decoder_layer(self, number: int) -> nn.Module | None:
        return block_output(self.model.language_model, number)

    def parameters(self) -> Any:
        return self.model.parameters()

    def start_step(self, batches: Sequence[dict[str, Any]]) -> None:
        """Take note of a step's planned micro-batches, which the chunk's next forward passes run in this order."""
        self._planned = list(batches)

    def release(self) -> None:
        """Stop listening to the model."""
        for handle in self.handles:
            handle.remove()

    # --- for a subclass's hooks -------------------------------------------------------------------------------------

    def next_planned(self) -> dict[str, Any]:
        """The planned batch of the forward pass that begins.

        Raises:
            ValueError: the step has no further one.
        """
        if not self._planned:
            raise ValueError(
                "The model runs more micro-batches than Objectives.start_step was given: give it all of a step, and "
                "call end_step before other forward passes."
            )
        return self._planned.pop(0)

    def enter(self, batch: dict[str, Any], length: int) -> None:
        """A forward pass over a planned batch begins, which the model pads or cuts to ``length``."""
        micro_batch: MicroBatch = batch["micro_batch"]
        if length != micro_batch.layout.sequence_length:
            tiles = micro_batch.layout.image_tiles
            micro_batch = replace(
                micro_batch, layout=sequence_layout(batch["tokens"], tiles, IMAGE_TOKEN_INDEX, length)
            )
        if self.pre_process and batch.get("targets"):
            targets = {name: features.cuda(non_blocking=True) for name, features in batch["targets"].items()}
            micro_batch = replace(micro_batch, targets=targets)
        shape = StreamShape(
            mixed_attention=False,
            rope="1d",
            tp_size=ps.get_tensor_model_parallel_world_size() if self._sequence_parallel else 1,
            cp_size=ps.get_context_parallel_world_size(),
            cp_rank=ps.get_context_parallel_rank(),
        )
        tp_rank = ps.get_tensor_model_parallel_rank() if self._sequence_parallel else 0
        whole_images = self.config.whole_images
        micro_batch = micro_batch.on_this_rank(shape, tp_rank, True, self.pre_process, whole_images)
        self.micro_batch = micro_batch
        for listener in self.on_micro_batch:
            listener(micro_batch)

    def weighted(self, losses: Tensor) -> Tensor:
        """The language model's losses on the last stage, whose gradient has the weight that the plan gives them."""
        assert self.micro_batch is not None
        return scale_gradient(losses, self.micro_batch.plan.weights[LANGUAGE_MODEL])

    def receive(self, features: Tensor, tokens: Tensor, images: Tensor | None) -> None:
        """The micro-batch's visual tokens are there, on the first stage; none where it has no image."""
        micro_batch = self.micro_batch
        assert micro_batch is not None
        targets = {name: stored.flatten(0, 1) for name, stored in micro_batch.targets.items()}
        for listener in self.on_visual_tokens:
            listener(self, micro_batch, VisualTokens(features, tokens, images, targets))
