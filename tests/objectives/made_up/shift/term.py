from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nemo_pre.parallel.replicated import sum_gradients_over_tensor_parallel
from nemo_pre.parallel.seeding import seeded
from nemo_pre.terms.layer_term import LayerTerm


@dataclass(frozen=True)
class Head:
    layers: tuple[int, ...]
    inputs: int
    outputs: int
    seed: int

    def parts(self) -> dict[str, nn.Module | Tensor]:
        return {"shift_head": self.build()}

    def build(self) -> nn.Module:
        with seeded(self.seed, "shift_head"):
            return nn.Linear(self.inputs, self.outputs)

    def add_to(self, chunk: Any) -> None:
        if any(chunk.decoder_layer(layer) is not None for layer in self.layers):
            chunk.shift_head = self.build()
            if chunk.config.sequence_parallel:
                sum_gradients_over_tensor_parallel(chunk.shift_head)


class ShiftTerm(LayerTerm):
    name = "shift"

    def prepare_model(self, model: Any) -> None:
        width = model.language_transformer_config.hidden_size
        model.parts["shift_head"] = Head(self.layers, width, self.options.head_width, self.seed)

    def anchor_width(self) -> int | None:
        return None

    def prepare_chunk(self, chunk: Any) -> None:
        self._head = getattr(chunk, "shift_head", None)

    def loss_sum(self, layer: int, micro_batch: Any, visual_tokens: Tensor, anchor: Tensor | None) -> Tensor:
        assert self._head is not None
        goal = 1.0 if self.options.direction == "up" else -1.0
        return (self._head(visual_tokens).float() - goal).square().mean(-1).sum()
