"""What VIRAL adds to a run: heads at target layers, the frozen target on the first stage, and its features' way."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_pre.config.vision_families import feature_width
from nemo_pre.objectives.cost import Cost, Message
from nemo_pre.objectives.viral import external_target, has_head
from nemo_pre.planner.chunks import Chunk, stage_of_layer
from nemo_pre.planner.flops import Flops
from nemo_pre.planner.load import FLOAT, INDEX, Load, activation_bytes
from nemo_pre.terms.target_cost import TargetCost, target_cost

HEADS, GRAM, TARGET = "VIRAL heads", "VIRAL Gram matrices", "frozen target"


class ViralCost(Cost):
    tf32_parts = (HEADS,)
    fp32_parts = (GRAM, TARGET)

    @property
    def target(self) -> TargetCost:
        """The frozen model, which costs nothing where the target is the model's own encoder."""
        if self.options.target == "encoder":
            return TargetCost(feature_width(self.config.model.vision))
        return target_cost(external_target(self.options))

    def uncounted(self) -> Iterator[str]:
        if self.target.problem is not None:
            yield self.target.problem

    def head_matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the head's linear layers; the decoder's width stands for a target's that is not
        known."""
        if not has_head(self.options):
            return []
        width = self.config.model.language.hidden_size
        hidden = [self.options.head_hidden_width] * (self.options.head_depth - 1)
        widths = [width, *hidden, self.target.width or width]
        return list(zip(widths, widths[1:], strict=False))

    def taps(self, chunk: Chunk) -> int:
        """How many of a chunk's layers are target layers."""
        return sum(layer - 1 in chunk.layers for layer in self.objective.tapped_layers())

    def parameters(self, chunk: Chunk) -> int:
        heads = self.taps(chunk)
        if self.options.shared_head:
            heads = min(heads, 1)
        return heads * sum(rows * (columns + 1) for columns, rows in self.head_matrices())

    def kept_at_layer(self, load: Load) -> int:
        """Bytes that one layer's head and loss keep for backward on the rank with most visual tokens: inputs of linear
        layers and of SiLUs, the loss's saved gradient, and in the relational form the unit vectors and their order."""
        size, visual = activation_bytes(self.config), load.on_fullest_rank(load.visual, load.length)
        matrices, width = self.head_matrices(), self.config.model.language.hidden_size
        output = matrices[-1][1] if matrices else width
        inside = 2 * sum(columns for columns, _ in matrices[1:]) + output  # float32, behind a head
        here = visual * ((width * size + inside * FLOAT if matrices else output * size) + INDEX)
        if self.options.form == "direct":
            return here
        compared = -(-load.rows * load.images // load.ranks) * -(-load.visual // load.images)
        return here + compared * (2 * output * FLOAT + 3 * FLOAT + 2 * INDEX)

    def state(self, stage: int, decoder_parameters: int) -> dict[str, int]:
        return {TARGET: self.target.parameters * FLOAT} if stage == 0 and self.target.parameters else {}

    def flops(self, load: Load, chunk: Chunk, dense: bool) -> dict[str, Flops]:
        """Matrix products on the mean rank: sequence and context parallelism share the visual tokens out; the target
        sees all tiles."""
        found = {}
        if taps := self.taps(chunk):
            inputs = load.rows * load.visual / load.ranks
            forward = sum(2.0 * inputs * columns * rows for columns, rows in self.head_matrices())
            entries = 0.0
            if self.options.form == "similarity":
                entries = load.rows * load.images * (load.visual / load.images) ** 2 / load.ranks
            width = self.target.width or self.config.model.language.hidden_size
            output = width if has_head(self.options) else self.config.model.language.hidden_size
            grams = 2.0 * entries * (2 * output + width)  # both matrices and the gradient, on the way forward
            found[HEADS] = Flops(forward, 2 * forward) * taps
            found[GRAM] = Flops(grams) * taps
        if chunk.first and self.target.flops:
            found[TARGET] = Flops(self.target.flops * load.rows * load.tiles)
        return found

    def messages(self, load: Load) -> list[Message]:
        """The target's features of a rank's shard, once to every later stage with a target layer."""
        stages = {stage_of_layer(self.config, layer - 1) for layer in self.objective.tapped_layers()} - {0}
        size = FLOAT if self.options.target == "external" else activation_bytes(self.config)
        width = self.target.width or self.config.model.language.hidden_size
        bytes_of_target = load.on_fullest_rank(load.visual, load.length) * width * size
        return [Message("VIRAL's target", 0, stage, bytes_of_target) for stage in sorted(stages)]
