"""Access to a decoder layer's output, also when activation recompute runs the layer twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nemo_pre.parallel.micro_batch import MicroBatch
from nemo_pre.terms.training import VisualChunk

Visitor = Callable[[int, MicroBatch, Tensor], Tensor]


class LayerTap:
    """Calls ``visit(layer, micro_batch, hidden_states) -> hidden_states`` on the output of one decoder layer.

    Under full activation recompute a layer runs first without a graph and again during the backward pass, when
    later micro-batches have already gone through. Backward passes of a chunk come in the order of its forward
    passes, so the micro-batches wait in a queue, and the visit is made when the layer runs with a graph.
    """

    def __init__(self, chunk: VisualChunk, number: int, layer: nn.Module, visit: Visitor) -> None:
        self._chunk = chunk
        self._number = number
        self._visit = visit
        self._to_recompute: deque[MicroBatch] = deque()
        self._handle = layer.register_forward_hook(self._on_output)

    def remove(self) -> None:
        self._handle.remove()

    def start_step(self) -> None:
        self._to_recompute.clear()

    def _on_output(self, layer: nn.Module, _: Any, output: Any) -> Any:
        if not self._chunk.observed:
            return output
        if isinstance(output, Tensor):  # a Mamba layer's
            return self._visited(layer, output)
        hidden_states, context = output
        return self._visited(layer, hidden_states), context

    def _visited(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        micro_batch = self._chunk.micro_batch
        assert micro_batch is not None
        if layer.training and not torch.is_grad_enabled():
            self._to_recompute.append(micro_batch)
            return hidden_states
        if self._to_recompute and torch.is_grad_enabled():
            micro_batch = self._to_recompute.popleft()
        return self._visit(self._number, micro_batch, hidden_states)
