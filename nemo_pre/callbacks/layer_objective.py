"""A loss term between decoder layers' visual tokens, on whatever stages these layers are, and the first stage.

What a term of this shape needs of the parallel model is here: taps on the layers, the anchor's way from the first
stage to them, the gradient's scale, the sum over ranks. What is compared, and how, is the subclass's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nemo_pre.callbacks.layer_tap import LayerTap
from nemo_pre.callbacks.step_planner import step_planner
from nemo_pre.config.schema import ScheduleConfig
from nemo_pre.neva.micro_batch import MicroBatch
from nemo_pre.neva.model import MCoreVisualNevaModel, VisualNevaConfig, VisualTokens, model_chunks
from nemo_pre.objectives.scale import StepPlan, global_mean, term_scale
from nemo_pre.parallel.anchor_exchange import AnchorExchange, anchor_group
from nemo_pre.parallel.auxiliary_gradient import backpropagate_with
from nemo_pre.parallel.sequence_cut import groups_that_cut, reports_its_tokens
from nemo_pre.parallel.sequence_layout import LocalVisualTokens


class LayerObjective(Callback):
    """Adds the term ``weight * mean over layers of (sum of loss_sum over the global batch / count)`` to a NeVA run.

    A subclass overrides :meth:`prepare_model` and :meth:`loss_sum`, and where the defaults do not fit
    :meth:`anchor`, :meth:`anchor_dtype`, :meth:`count`, :meth:`prepare_chunk` and :meth:`metrics`.

    Args:
        term: its name among the terms of a step, and before the slash in its metrics' names.
        weight: its weight in the loss.
        schedule: of the weight.

    Raises:
        ValueError: when training starts, for a layer that the model does not have.

    Attributes:
        layers: the tapped decoder layers, 1-based; from ``setup`` on.
        anchor_width: width of the anchor; from ``setup`` on.
        neva: the model's configuration; from ``on_fit_start`` on, with the next.
        cut_over: the groups of ranks over which an image's tokens are spread.
    """

    layers: tuple[int, ...]
    anchor_width: int
    neva: VisualNevaConfig
    cut_over: list[dist.ProcessGroup]

    def __init__(self, term: str, weight: float, schedule: ScheduleConfig) -> None:
        self.term, self.weight, self.schedule = term, weight, schedule
        self._chunks: list[MCoreVisualNevaModel] = []
        self._taps: list[LayerTap] = []
        self._exchange: AnchorExchange | None = None
        self._losses: dict[int, dict[int, Tensor]] = {}
        self._plan: StepPlan | None = None

    # --- what a subclass says ---------------------------------------------------------------------------------------

    def prepare_model(self, neva: VisualNevaConfig) -> tuple[tuple[int, ...], int]:
        """Before the model is built: ask ``neva`` for what the term needs of it, such as heads.

        Returns:
            The layers to tap, 1-based, and the anchor's width.
        """
        raise NotImplementedError

    def prepare_chunk(self, chunk: MCoreVisualNevaModel) -> None:
        """When the weights of ``init_from`` are there; those of a checkpoint that is resumed come later."""

    def anchor(self, chunk: MCoreVisualNevaModel, visual: VisualTokens) -> Tensor:
        """On the first stage, without a graph: what is compared with, ``[n, anchor_width]`` of all ``n`` visual tokens
        of a micro-batch. By default what enters the language model."""
        return visual.tokens

    def anchor_dtype(self) -> torch.dtype:
        """What the anchor is sent in: by default the activations' type. The same on every rank."""
        if self.neva.bf16:
            return torch.bfloat16
        return torch.float16 if self.neva.fp16 else self.neva.params_dtype

    def loss_sum(self, layer: int, micro_batch: MicroBatch, visual_tokens: Tensor, anchor: Tensor) -> Tensor:
        """On the layer's stage: the sum, over this rank's visual tokens of a micro-batch, of the loss.

        Args:
            visual_tokens: ``[n, d]``, the layer's output at this rank's visual tokens; ``n`` may be 0.
            anchor: ``[n, anchor_width]``, of the same tokens.
        """
        raise NotImplementedError

    def count(self, plan: StepPlan) -> int:
        """What the loss is averaged over, of the global batch: by default its visual tokens."""
        return plan.visual_tokens

    def metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """What is recorded of the term's mean over the layers beside ``<term>/loss`` and ``<term>/weight``."""
        return {}

    # --- installation -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.layers, self.anchor_width = self.prepare_model(pl_module.config)
        step_planner(trainer).add_term(self, self.term, self.weight, self.schedule)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from megatron.core import parallel_state as ps

        self._chunks = model_chunks(trainer)
        self.neva = self._chunks[0].config
        self.cut_over = groups_that_cut(self.neva.sequence_parallel)
        self._counts_here = reports_its_tokens(self.neva.sequence_parallel)
        for chunk in self._chunks:
            taps = [
                LayerTap(chunk, number, layer, self._visit)
                for number in self.layers
                if (layer := chunk.decoder_layer(number)) is not None
            ]
            if taps and not self._taps:  # the first tapped chunk fetches for the later ones
                chunk.on_micro_batch.append(self._expect)
            self._taps += taps
            if chunk.add_encoder:
                chunk.on_visual_tokens.append(self._publish)
            self.prepare_chunk(chunk)
        group, stage = anchor_group(), ps.get_pipeline_model_parallel_rank()
        readers: list[Any] = [None] * group.size()
        dist.all_gather_object(readers, len(self._taps), group=group)
        if not 0 < sum(readers) == len(self.layers):
            raise ValueError(f"{self.term} looks at layers {list(self.layers)}: the model has {sum(readers)} of them.")
        self._exchange = AnchorExchange(group, stage, readers)
        self._exchange.connect(next(self._chunks[0].parameters()).device)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take everything off again: a saved or reused model carries no trace but the heads' weights."""
        for tap in self._taps:
            tap.remove()
        for chunk in self._chunks:
            chunk.on_micro_batch = [listener for listener in chunk.on_micro_batch if listener != self._expect]
            chunk.on_visual_tokens = [listener for listener in chunk.on_visual_tokens if listener != self._publish]
        self._taps, self._chunks, self._exchange = [], [], None

    # --- one step ---------------------------------------------------------------------------------------------------

    def on_megatron_microbatches_start(self, step: Any) -> None:
        self._start_step()

    def _start_step(self) -> None:
        # By micro-batch: activation recompute visits one twice, and it counts once.
        self._losses = {number: {} for number in self.layers}
        for tap in self._taps:
            tap.start_step()

    def forget_step(self) -> None:
        """After a pass over the step's micro-batches that is not the step itself."""
        assert self._exchange is not None
        self._exchange.finish_step()
        self._start_step()

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], forward_callback: Any) -> None:
        self._plan = batch["micro_batch"].plan

    def _expect(self, micro_batch: MicroBatch) -> None:
        """Before a tapped chunk runs: start receiving its anchor."""
        assert self._exchange is not None
        source = _local(micro_batch).source
        shape = (len(source), self.anchor_width)
        self._exchange.expect(micro_batch.index, shape, self.anchor_dtype(), source.device)

    @torch.no_grad()
    def _publish(self, chunk: MCoreVisualNevaModel, micro_batch: MicroBatch, visual: VisualTokens) -> None:
        """On the first stage: the anchor of this rank's shard, to whoever taps."""
        assert self._exchange is not None
        anchor = self.anchor(chunk, visual).to(self.anchor_dtype())
        self._exchange.publish(micro_batch.index, anchor[_local(micro_batch).source])

    def _visit(self, layer: int, micro_batch: MicroBatch, hidden_states: Tensor) -> Tensor:
        """On a tapped layer's output: compute the loss, note it, inject its gradient."""
        assert self._exchange is not None
        anchor = self._exchange.take(micro_batch.index)
        visual_tokens = hidden_states.reshape(-1, hidden_states.shape[-1])[_local(micro_batch).position]
        loss_sum = self.loss_sum(layer, micro_batch, visual_tokens, anchor)
        self._losses[layer][micro_batch.index] = loss_sum.detach()
        if not torch.is_grad_enabled():
            return hidden_states
        plan = micro_batch.plan
        scale = term_scale(plan, self.term, self.count(plan), self.neva, parts=len(self.layers))
        return backpropagate_with(hidden_states, loss_sum * scale)

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any) -> None:
        """Log the global value on every rank, whatever stage computed it."""
        assert self._exchange is not None and self._plan is not None
        self._exchange.finish_step()
        sums = torch.stack([self._sum_of(layer) for layer in self.layers])
        dist.all_reduce(sums)
        losses = global_mean(sums, self.count(self._plan))
        logged = {"loss": losses.mean(), "weight": torch.tensor(self._plan.weights[self.term])}
        logged |= self.metrics(losses.mean())
        if len(self.layers) > 1:
            logged |= {f"loss_layer_{layer}": loss for layer, loss in zip(self.layers, losses, strict=True)}
        for name, value in logged.items():
            step.trainer.lightning_module.log(f"{self.term}/{name}", value, batch_size=1)

    def _sum_of(self, layer: int) -> Tensor:
        device = torch.cuda.current_device()
        losses = list(self._losses[layer].values()) if self._counts_here else []
        return torch.stack(losses).sum().double() if losses else torch.zeros((), dtype=torch.float64, device=device)


def _local(micro_batch: MicroBatch) -> LocalVisualTokens:
    assert micro_batch.local is not None, "a listener runs after the chunk has placed its micro-batch"
    return micro_batch.local
