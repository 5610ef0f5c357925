"""What PRe adds to a run: a head at every target layer, and the anchor's way there."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_pre.config.vision_families import feature_width
from nemo_pre.objectives.cost import Cost, Message
from nemo_pre.objectives.pre import external_anchor
from nemo_pre.planner.chunks import Chunk, stage_of_layer
from nemo_pre.planner.flops import Flops, projector_flops
from nemo_pre.planner.load import FLOAT, INDEX, Load, activation_bytes
from nemo_pre.planner.parameters import projector_parameters
from nemo_pre.terms.target_cost import TargetCost, target_cost
from nemo_pre.whole_numbers import part_nearest

HEADS, MOVING, EXTERNAL = "PRe heads", "moving anchor", "external anchor"


class PReCost(Cost):
    tf32_parts = (HEADS,)
    fp32_parts = (MOVING, EXTERNAL)

    @property
    def moving_anchor(self) -> bool:
        """Whether an average of the projector is kept beside it."""
        return self.options.ema_momentum is not None

    @property
    def external(self) -> TargetCost:
        """The frozen model behind ``anchor=external``; nothing with another anchor."""
        external = self.options.anchor == "external"
        return target_cost(external_anchor(self.options)) if external else TargetCost(None)

    def uncounted(self) -> Iterator[str]:
        if self.external.problem is not None:
            yield self.external.problem

    def head_matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of one head's linear layers; the decoder's width stands for an external anchor's that is
        not known."""
        width = self.config.model.language.hidden_size
        hidden = max(1, part_nearest(self.options.head_hidden_ratio, width))
        output = feature_width(self.config.model.vision) if self.options.anchor == "pre_projector" else width
        return [(width, hidden), (hidden, self.external.width or output)]

    def head_parameters(self) -> int:
        """Parameters of one head."""
        norm = 2 * self.config.model.language.hidden_size if self.options.head_norm else 0
        return norm + sum(rows * (columns + 1) for columns, rows in self.head_matrices())

    def taps(self, chunk: Chunk) -> int:
        """How many of a chunk's layers are target layers."""
        return sum(layer - 1 in chunk.layers for layer in self.objective.tapped_layers())

    def parameters(self, chunk: Chunk) -> int:
        return self.taps(chunk) * self.head_parameters()

    def kept_at_layer(self, load: Load) -> int:
        """Bytes one head keeps for backward on the rank with most visual tokens, with the loss's saved gradient, which
        is shaped like the prediction."""
        size, patch = activation_bytes(self.config), self.options.variant == "patch"
        (width, hidden), (_, output) = self.head_matrices()
        visual = load.on_fullest_rank(load.visual, load.length)
        pooled = visual if patch else load.rows * load.images
        given = size if patch and not self.options.head_norm else FLOAT  # means, and what a norm makes, are float32
        norm = (width + 2) * FLOAT if self.options.head_norm else 0
        norm_weights = 2 * width * FLOAT if self.options.head_norm and size < FLOAT else 0
        per_image = FLOAT + 1  # its tokens, and whether it has any
        pooling = 0 if patch else visual * (width * FLOAT + INDEX) + pooled * per_image
        head = pooled * (width * given + (2 * hidden + output) * FLOAT + norm) + norm_weights
        return head + visual * INDEX + pooling

    def state(self, stage: int, decoder_parameters: int) -> dict[str, int]:
        held = {
            MOVING: projector_parameters(self.config) * FLOAT * self.moving_anchor,
            EXTERNAL: self.external.parameters * FLOAT,
        }
        return {kind: size for kind, size in held.items() if size and stage == 0}

    def flops(self, load: Load, chunk: Chunk, dense: bool) -> dict[str, Flops]:
        """FLOPs of the heads on the mean rank: sequence and context parallelism share the visual tokens out."""
        found = {}
        if taps := self.taps(chunk):
            if self.options.variant == "global":
                inputs: float = load.rows * load.images
            else:
                inputs = load.rows * load.visual / load.replicas / load.shards
            forward = taps * sum(2.0 * inputs * columns * rows for columns, rows in self.head_matrices())
            found[HEADS] = Flops(forward, 2 * forward)
        if self.moving_anchor and chunk.first:
            found[MOVING] = Flops(projector_flops(self.config, load))
        if chunk.first and self.external.flops:
            found[EXTERNAL] = Flops(self.external.flops * load.rows * load.tiles)
        return found

    def messages(self, load: Load) -> list[Message]:
        """The anchor of a rank's shard, once to every later stage with a target layer."""
        stages = {stage_of_layer(self.config, layer - 1) for layer in self.objective.tapped_layers()} - {0}
        size = FLOAT if self.moving_anchor or self.options.anchor == "external" else activation_bytes(self.config)
        tokens = load.on_fullest_rank(load.visual, load.length)
        bytes_of_anchor = tokens * self.head_matrices()[-1][1] * size
        return [Message("PRe's anchor", 0, stage, bytes_of_anchor) for stage in sorted(stages)]
