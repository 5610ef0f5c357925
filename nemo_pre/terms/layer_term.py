"""A loss term on decoder layers' visual tokens, wherever these layers are, beside what the first stage knows.

What a term of this shape needs of the parallel model is here: taps on the layers, the anchor's way from the first
stage to them, the gradient's scale, the sum over ranks. What is compared, and how, is the subclass's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.objectives.objective import target_layers
from nemo_pre.objectives.scale import StepPlan, global_mean, term_scale
from nemo_pre.parallel.anchor_exchange import AnchorExchange
from nemo_pre.parallel.auxiliary_gradient import backpropagate_with
from nemo_pre.parallel.micro_batch import MicroBatch, VisualTokens
from nemo_pre.parallel.sequence_cut import batch_shard_groups, counts_local_tokens, sequence_shard_groups
from nemo_pre.parallel.sequence_layout import LocalVisualTokens
from nemo_pre.terms.layer_tap import LayerTap
from nemo_pre.terms.term import Term, Weight
from nemo_pre.terms.training import Training, VisualChunk, VisualModelConfig


class LayerTerm(Term):
    """Adds ``weight * mean over layers of (sum of loss_sum over the global batch / count)`` to the loss.

    The options have ``weight``, ``schedule`` and ``layers`` (1-based; null: L/2; -1: the last). A subclass overrides
    :meth:`loss_sum`, and where the defaults do not fit :meth:`prepare_model`, :meth:`anchor_width`, :meth:`anchor`,
    :meth:`anchor_dtype`, :meth:`count`, :meth:`prepare_chunk` and :meth:`metrics`.

    Args:
        options: the objective's.
        seed: of the initial weights of what the term adds to the model.

    Raises:
        ValueError: from :meth:`prepare`, for a layer that the model does not have.

    Attributes:
        name: the objective's: the term's in a step's plan, and before the slash in its metrics' names.
        layers: the tapped decoder layers, 1-based; from :meth:`prepare` on.
        model: the model's configuration; from :meth:`prepare` on.
        image_groups: the groups of ranks over which an image's tokens are spread; from :meth:`install` on.
        batch_groups: the groups of ranks over which the tokens of one micro-batch of all replicas are spread.
    """

    layers: tuple[int, ...]
    model: VisualModelConfig
    image_groups: list[dist.ProcessGroup]
    batch_groups: list[dist.ProcessGroup]

    def __init__(self, options: Any, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._chunks: list[VisualChunk] = []
        self._taps: list[LayerTap] = []
        self._exchange: AnchorExchange | None = None
        self._losses: dict[int, dict[int, Tensor]] = {}

    # --- what a subclass says ---------------------------------------------------------------------------------------

    def prepare_model(self, model: VisualModelConfig) -> None:
        """Ask the model, before it is built and when ``layers`` is known, for what the term needs, such as heads."""

    def anchor_width(self) -> int | None:
        """Width of what the first stage sends to the layers, the same on every rank: by default the decoder's. None
        for a term that looks at its layers alone."""
        return self.model.language_transformer_config.hidden_size

    def prepare_chunk(self, chunk: VisualChunk) -> None:
        """Prepare a chunk when the weights of ``init_from`` are there; those of a checkpoint that is resumed come
        later."""

    def anchor(self, chunk: VisualChunk, visual: VisualTokens) -> Tensor:
        """What the term compares with, ``[n, anchor_width]`` of all ``n`` visual tokens of a micro-batch: asked on the
        first stage, without a graph. What enters the language model by default."""
        return visual.tokens

    def anchor_dtype(self) -> torch.dtype:
        """What the anchor is sent in: by default the activations' type. The same on every rank."""
        if self.model.bf16:
            return torch.bfloat16
        return torch.float16 if self.model.fp16 else self.model.params_dtype

    def loss_sum(self, layer: int, micro_batch: MicroBatch, visual_tokens: Tensor, anchor: Tensor | None) -> Tensor:
        """The loss summed over this rank's visual tokens of a micro-batch, on the layer's stage.

        Args:
            visual_tokens: ``[n, d]``, the layer's output at this rank's visual tokens; ``n`` may be 0.
            anchor: ``[n, anchor_width]``, of the same tokens; None for a term without one.
        """
        raise NotImplementedError

    def count(self, plan: StepPlan) -> int:
        """What the loss is averaged over, of the global batch: by default its visual tokens. Another count comes from
        :meth:`counts`, never from this rank's tokens."""
        return plan.visual_tokens

    def metrics(self, loss: Tensor) -> Mapping[str, Tensor]:
        """What is recorded of the term's mean over the layers beside ``<name>/loss`` and ``<name>/weight``."""
        return {}

    # --- installation -----------------------------------------------------------------------------------------------

    def weights(self) -> Mapping[str, Weight]:
        return {self.name: Weight(self.options.weight, self.options.schedule)}

    def prepare(self, model: VisualModelConfig) -> None:
        self.model = model
        num_layers = model.decoder_layers
        self.layers = target_layers(self.options.layers, num_layers, f"objective.{self.name}.layers")
        self.prepare_model(model)

    def install(self, training: Training) -> None:
        self._chunks = list(training.chunks)
        self.model = self._chunks[0].config
        sequence_parallel = self.model.sequence_parallel
        self.image_groups = sequence_shard_groups(sequence_parallel)
        self.batch_groups = batch_shard_groups(sequence_parallel)
        self._counts_here = counts_local_tokens(sequence_parallel)
        has_anchor = self.anchor_width() is not None
        for chunk in self._chunks:
            taps = [
                LayerTap(chunk, number, layer, self._visit)
                for number in self.layers
                if (layer := chunk.decoder_layer(number)) is not None
            ]
            if has_anchor and taps and not self._taps:  # the first tapped chunk fetches for the later ones
                chunk.on_micro_batch.append(self._expect)
            self._taps += taps
            if has_anchor and chunk.pre_process:
                chunk.on_visual_tokens.append(self._publish)
            self.prepare_chunk(chunk)
        if has_anchor:
            self._exchange = AnchorExchange.install(len(self._taps), next(self._chunks[0].parameters()).device)

    def remove(self) -> None:
        for tap in self._taps:
            tap.remove()
        for chunk in self._chunks:
            chunk.on_micro_batch = [listener for listener in chunk.on_micro_batch if listener != self._expect]
            chunk.on_visual_tokens = [listener for listener in chunk.on_visual_tokens if listener != self._publish]
        self._taps, self._chunks, self._exchange = [], [], None

    # --- one step ---------------------------------------------------------------------------------------------------

    def start_step(self) -> None:
        # By micro-batch: activation recompute visits one twice, and it counts once.
        self._losses = {number: {} for number in self.layers}
        for tap in self._taps:
            tap.start_step()

    def forget_step(self) -> None:
        if self._exchange is not None:
            self._exchange.finish_step()
        self.start_step()

    def _expect(self, micro_batch: MicroBatch) -> None:
        """Start receiving a tapped chunk's anchor before the chunk runs."""
        assert self._exchange is not None
        source, width = _local(micro_batch).source, self.anchor_width()
        assert width is not None
        self._exchange.expect(micro_batch.index, (len(source), width), self.anchor_dtype(), source.device)

    @torch.no_grad()
    def _publish(self, chunk: VisualChunk, micro_batch: MicroBatch, visual: VisualTokens) -> None:
        """Send the anchor of this rank's shard, on the first stage, to whoever taps."""
        assert self._exchange is not None
        anchor = self.anchor(chunk, visual).to(self.anchor_dtype())
        self._exchange.publish(micro_batch.index, anchor[_local(micro_batch).source])

    def _visit(self, layer: int, micro_batch: MicroBatch, hidden_states: Tensor) -> Tensor:
        """Compute the loss on a tapped layer's output, note it, and inject its gradient."""
        anchor = None if self._exchange is None else self._exchange.take(micro_batch.index)
        visual_tokens = hidden_states.reshape(-1, hidden_states.shape[-1])[_local(micro_batch).position]
        loss_sum = self.loss_sum(layer, micro_batch, visual_tokens, anchor)
        self._losses[layer][micro_batch.index] = loss_sum.detach()
        if not torch.is_grad_enabled():
            return hidden_states
        plan = micro_batch.plan
        scale = term_scale(plan, self.name, self.count(plan), self.model, parts=len(self.layers))
        return backpropagate_with(hidden_states, loss_sum * scale)

    def end_step(self, plan: StepPlan) -> Mapping[str, Tensor | float]:
        if self._exchange is not None:
            self._exchange.finish_step()
        sums = torch.stack([self._sum_of(layer) for layer in self.layers])
        dist.all_reduce(sums)
        found: dict[str, Tensor | float] = {"weight": plan.weights[self.name]}
        if (count := self.count(plan)) > 0:
            losses = global_mean(sums, count)
            found |= {"loss": losses.mean(), **self.metrics(losses.mean())}
            if len(self.layers) > 1:
                found |= {f"loss_layer_{layer}": loss for layer, loss in zip(self.layers, losses, strict=True)}
        return {f"{self.name}/{key}": value for key, value in found.items()}

    def _sum_of(self, layer: int) -> Tensor:
        device = torch.cuda.current_device()
        losses = list(self._losses[layer].values()) if self._counts_here else []
        return torch.stack(losses).sum().double() if losses else torch.zeros((), dtype=torch.float64, device=device)


def _local(micro_batch: MicroBatch) -> LocalVisualTokens:
    assert micro_batch.local is not None, "a listener runs after the chunk has placed its micro-batch"
    return micro_batch.local
