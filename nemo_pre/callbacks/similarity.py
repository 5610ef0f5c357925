"""How alike the visual tokens of an image are, layer by layer: the homogenisation that LaVer sets out to stop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nemo_pre.callbacks.metrics import record_metrics
from nemo_pre.losses.pairwise_cosine import pair_cosines
from nemo_pre.neva.model import MCoreVisualNevaModel, VisualTokens, model_chunks
from nemo_pre.parallel.image_pooling import sum_per_image
from nemo_pre.parallel.micro_batch import MicroBatch
from nemo_pre.parallel.sequence_cut import sequence_shard_groups
from nemo_pre.terms.layer_tap import LayerTap
from nemo_pre.terms.training import VisualChunk


class VisualSimilarityCallback(Callback):
    """Every ``every`` training steps records ``similarity/layer_<l>``: the mean cosine between two different visual
    tokens of one image in the output of decoder layer ``l`` (0: what enters the decoder), over the global batch.

    Linear in the tokens (:mod:`nemo_pre.losses.pairwise_cosine`). Works with layers on different pipeline stages and
    with images that sequence or context parallelism cuts.

    Source: LaVer (arXiv 2512.06281), its analysis of layer-wise homogenisation.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._taps: list[LayerTap] = []
        self._chunks: list[MCoreVisualNevaModel] = []
        self._active = False
        self._sums: dict[tuple[int, int], Tensor] = {}  # by layer and micro-batch: sum of cosines, number of pairs
        self._similarity: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from megatron.core import parallel_state as ps

        self._chunks = model_chunks(trainer)
        language = self._chunks[0].config.language_transformer_config
        self._num_layers = language.num_layers
        for chunk in self._chunks:
            for layer in chunk.language_model.decoder.layers:
                self._taps.append(LayerTap(chunk, layer.layer_number, layer, self._visit))
            if chunk.pre_process:
                chunk.on_visual_tokens.append(self._visit_input)
        self._groups = sequence_shard_groups(language.sequence_parallel)
        # What is pooled over these ranks, or held by all of them, is counted on one.
        self._counts_here = ps.get_tensor_model_parallel_rank() == ps.get_context_parallel_rank() == 0

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for tap in self._taps:
            tap.remove()
        for chunk in self._chunks:
            chunk.on_visual_tokens = [heard for heard in chunk.on_visual_tokens if heard != self._visit_input]
        self._taps, self._chunks = [], []

    def on_megatron_microbatches_start(self, step: Any) -> None:
        self._active = (step.trainer.global_step + 1) % self.every == 0
        self._sums = {}
        for tap in self._taps:
            tap.start_step()

    def _visit(self, layer: int, micro_batch: MicroBatch, hidden_states: Tensor) -> Tensor:
        if self._active:
            assert micro_batch.local is not None
            tokens = hidden_states.detach().reshape(-1, hidden_states.shape[-1])[micro_batch.local.position]
            self._note(layer, micro_batch, tokens, micro_batch.local.image, self._groups)
        return hidden_states

    def _visit_input(self, chunk: VisualChunk, micro_batch: MicroBatch, visual: VisualTokens) -> None:
        if self._active:  # every rank of the first stage has the whole sequence here
            assert micro_batch.places is not None
            tokens = visual.tokens.detach()[micro_batch.places.visual.source]
            self._note(0, micro_batch, tokens, micro_batch.places.image, [])

    @torch.no_grad()
    def _note(self, layer: int, micro_batch: MicroBatch, tokens: Tensor, image: Tensor, groups: list[Any]) -> None:
        units = F.normalize(tokens.float(), dim=-1)
        sums, sizes = sum_per_image(units, image, micro_batch.layout.num_images, groups)
        cosines, pairs = pair_cosines(sums.double(), sizes.squeeze(1).double())
        self._sums[layer, micro_batch.index] = torch.stack([cosines.sum(), pairs.sum()])

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any) -> None:
        if not self._active:
            return
        sums = torch.zeros(self._num_layers + 1, 2, dtype=torch.float64, device=torch.cuda.current_device())
        for (layer, _), pair in self._sums.items() if self._counts_here else ():
            sums[layer] += pair
        dist.all_reduce(sums)
        self._similarity = {
            f"similarity/layer_{layer}": cosines / pairs
            for layer, (cosines, pairs) in enumerate(sums.tolist())
            if pairs
        }

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._similarity:
            record_metrics(trainer, self._similarity)
            self._similarity = {}
