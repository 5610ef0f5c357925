"""What LaVer adds to a run: a second sequence, a visual head, and a teacher of every stage's layers."""

from __future__ import annotations

from collections import Counter

from nemo_pre.objectives.cost import BranchLoad, Cost
from nemo_pre.objectives.laver.schedules import update_interval
from nemo_pre.planner.chunks import Chunk
from nemo_pre.planner.flops import Flops, attention_flops, layer_matrices, visible_pairs
from nemo_pre.planner.load import FLOAT, INDEX, Load, activation_bytes
from nemo_pre.planner.memory import stages_that_differ
from nemo_pre.planner.parameters import layer_parameters, rank_parameters
from nemo_pre.planner.step_time import Machine
from nemo_pre.whole_numbers import part_up

HEADS, GRAM = "LaVer heads", "LaVer Gram matrices"


class LaVerCost(Cost):
    decoder_copies = 1  # the teacher's
    tf32_parts = (HEADS,)
    fp32_parts = (GRAM,)

    def head_parameters(self) -> int:
        """Parameters of the visual head."""
        width, hidden = self.config.model.language.hidden_size, self.options.head_hidden_width
        return hidden * (width + 1) + hidden * (hidden + 1) + width * hidden

    def parameters(self, chunk: Chunk) -> int:
        """The visual head on the last stage, a learned mask token on the first."""
        mask_token = self.config.model.language.hidden_size if self.options.mask_token == "learned" else 0
        return self.head_parameters() * chunk.last + mask_token * chunk.first

    def branch(self, visual: int, length: int, multiple: int) -> BranchLoad | None:
        whole = self.options.sequence == "whole"
        tokens = length if whole else -(-visual // multiple) * multiple
        return BranchLoad(tokens, masked=part_up(self.options.mask_ratio, visual), whole=whole)

    # --- memory -----------------------------------------------------------------------------------------------------

    def kept(self, load: Load, chunk: Chunk) -> Counter[str]:
        """The student's head on the fullest rank, the images it compares, and the loss' gradient by masked tokens."""
        if not chunk.last:
            return Counter()
        size, width, ranks = activation_bytes(self.config), self.config.model.language.hidden_size, load.ranks
        here = load.on_fullest_rank(load.visual, load.branch)
        per_image = -(-load.visual // load.images)
        together = self.options.gram_scope == "micro_batch"
        images = load.rows * load.images if together else -(-load.rows * load.images // ranks)
        compared = images * per_image
        masked = min(load.rows * load.masked, here)
        head = here * (width * size + (width + 4 * self.options.head_hidden_width) * FLOAT + 2 * INDEX)
        gram = compared * (2 * width * FLOAT + 2 * FLOAT + INDEX)
        return Counter({"LaVer": head + gram + masked * (width * FLOAT + INDEX)})

    def averaged(self, stage: int, decoder_parameters: int) -> int:
        """Parameters of a rank that the teacher is an average of."""
        last = stage == self.config.parallel.pipeline - 1
        return decoder_parameters + self.head_parameters() * last

    def state(self, stage: int, decoder_parameters: int) -> dict[str, int]:
        """A float32 average cut over replicas, and the copy that computes: all of it, or the largest layer's."""
        layout = self.config.parallel
        averaged = self.averaged(stage, decoder_parameters)
        largest = max(layer_parameters(self.config, layout.tensor), averaged - decoder_parameters)
        copied = averaged if self.options.teacher_memory == "resident" else largest
        average = averaged * FLOAT // (layout.data * layout.context)
        return {"teacher": average + copied * activation_bytes(self.config)}

    # --- time -------------------------------------------------------------------------------------------------------

    def flops(self, load: Load, chunk: Chunk, dense: bool) -> dict[str, Flops]:
        found = {"teacher": self._teacher(load, dense) * len(chunk.layers)}
        if chunk.last:
            found |= {HEADS: self._heads(load), GRAM: self._gram(load)}
        return found

    def _teacher(self, load: Load, dense: bool) -> Flops:
        """A decoder layer of the teacher on the unmasked branch, forward only."""
        pairs = float(load.branch**2) if dense else visible_pairs(self.config, load, samples=False, branch=True)
        tokens = load.rows * load.branch // load.replicas
        return Flops(2.0 * tokens * layer_matrices(self.config) + attention_flops(self.config, load, pairs))

    def _heads(self, load: Load) -> Flops:
        """The student's head both ways, the teacher's forward."""
        width, hidden = self.config.model.language.hidden_size, self.options.head_hidden_width
        inputs = load.rows * load.visual / load.ranks
        head = 2.0 * inputs * (2 * width * hidden + hidden**2)
        return Flops(2 * head, 2 * head)

    def _gram(self, load: Load) -> Flops:
        """Three products per Gram matrix, on the way forward: both matrices, and the gradient."""
        share = self.options.mask_ratio if self.options.gram_positions == "masked" else 1.0
        per_image = share * load.visual / load.images
        if self.options.gram_scope == "micro_batch":
            entries = (load.rows * load.images * per_image) ** 2  # on one rank, the fullest
        else:
            entries = load.rows * load.images * per_image**2 / load.ranks
        return Flops(3 * 2.0 * entries * self.config.model.language.hidden_size)

    def seconds(self, machine: Machine, micro_batches: int) -> dict[str, float]:
        """The average reads the student and itself and is written; its weights are gathered once an update, or layer
        by layer in every micro-batch. Nothing of it is taken to be hidden, though the first layers' gather can be."""
        layout = self.config.parallel
        replicas = layout.data * layout.context
        averaged = max(
            self.averaged(stage, rank_parameters(self.config, stage)["decoder"])
            for stage in stages_that_differ(self.config)
        )
        size = activation_bytes(self.config)
        move = averaged / replicas * (size + 2 * FLOAT) / machine.memory_bandwidth
        gather = averaged * size * (replicas - 1) / replicas / machine.between_replicas(layout)
        interval = update_interval(
            self.options.update_every, self.options.update_fraction, self.config.trainer.max_steps
        )
        gathers = 1 / interval if self.options.teacher_memory == "resident" else micro_batches
        return {"teacher's weights": move / interval + gather * gathers}
