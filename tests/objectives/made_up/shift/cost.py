from __future__ import annotations

from nemo_pre.objectives.cost import Cost
from nemo_pre.planner.chunks import Chunk
from nemo_pre.planner.flops import Flops
from nemo_pre.planner.load import Load, activation_bytes


class ShiftCost(Cost):
    def parameters(self, chunk: Chunk) -> int:
        tapped = any(layer - 1 in chunk.layers for layer in self.objective.tapped_layers())
        return tapped * (self.config.model.language.hidden_size + 1) * self.options.head_width

    def kept_at_layer(self, load: Load) -> int:
        return load.on_fullest_rank(load.visual, load.length) * self.options.head_width * activation_bytes(self.config)

    def flops(self, load: Load, chunk: Chunk, dense: bool) -> dict[str, Flops]:
        taps = sum(layer - 1 in chunk.layers for layer in self.objective.tapped_layers())
        products = 2.0 * load.rows * load.visual * self.config.model.language.hidden_size * self.options.head_width
        return {"Shift's head": Flops(products, 2 * products) * taps}
