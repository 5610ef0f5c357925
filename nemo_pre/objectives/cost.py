"""What an objective adds to a run's parameters, memory, FLOPs and messages: what the planner asks of it.

Everything is of one rank and one micro-batch unless a method says otherwise; where a method does not fit an objective,
its default counts nothing. Nothing here or in a subclass imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_pre.objectives.objective import Objective
    from nemo_pre.planner.chunks import Chunk
    from nemo_pre.planner.flops import Flops
    from nemo_pre.planner.load import Load
    from nemo_pre.planner.step_time import Machine


@dataclass(frozen=True)
class BranchLoad:
    """The second sequence that an objective runs beside the samples, per row.

    Attributes:
        tokens: of the sequence.
        masked: visual tokens of a row that the student does not see, at the most.
        whole: each sample again with its text, rather than its images, each by itself.
    """

    tokens: int
    masked: int
    whole: bool


@dataclass(frozen=True)
class Message:
    """Bytes that travel between two pipeline stages in a micro-batch, beside the activations.

    Attributes:
        kind: what they are.
        source: the stage that sends them.
        target: the stage that receives them.
        bytes: from one rank of the source to its peer.
    """

    kind: str
    source: int
    target: int
    bytes: int


class Cost:
    """What one enabled objective adds.

    Attributes:
        decoder_copies: further copies of the decoder's layers that compute beside the student's.
        tf32_parts: of :meth:`flops`, those whose products are TF32's in a bf16 run, as
            :class:`nemo_pre.terms.float32.Float32Linear`'s are.
        fp32_parts: those whose products are float32's.
    """

    decoder_copies: int = 0
    tf32_parts: tuple[str, ...] = ()
    fp32_parts: tuple[str, ...] = ()

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.config = objective.config
        self.options: Any = objective.options

    def uncounted(self) -> Iterator[str]:
        """What is left out of the figures below, as one sentence each, such as a model that is not within reach."""
        yield from ()

    def parameters(self, chunk: Chunk) -> int:
        """Trained parameters that lie on every rank of the stage that holds ``chunk``, whatever its tensor rank."""
        return 0

    def branch(self, visual: int, length: int, multiple: int) -> BranchLoad | None:
        """The sequence beside the samples.

        Args:
            visual: visual tokens of a row.
            length: tokens of a row.
            multiple: what a sequence's length is a multiple of, so that ranks have equal shares.
        """
        return None

    def kept(self, load: Load, chunk: Chunk) -> Counter[str]:
        """Bytes kept from the forward to the backward pass outside of decoder layers, by part of the plan."""
        return Counter()

    def kept_at_layer(self, load: Load) -> int:
        """Bytes kept at a layer of ``objective.tapped_layers()``; recomputed with the layer where that is."""
        return 0

    def state(self, stage: int, decoder_parameters: int) -> dict[str, int]:
        """Bytes that live from step to step beside the trained parameters, by kind.

        Args:
            stage: the pipeline stage, from 0.
            decoder_parameters: of a rank of this stage.
        """
        return {}

    def flops(self, load: Load, chunk: Chunk, dense: bool) -> dict[str, Flops]:
        """Matrix products, by part of the plan.

        Args:
            dense: attention computes every pair of tokens and masks it afterwards.
        """
        return {}

    def messages(self, load: Load) -> list[Message]:
        """What travels between stages beside the activations."""
        return []

    def seconds(self, machine: Machine, micro_batches: int) -> dict[str, float]:
        """Seconds of a step that its passes do not contain, by what they are for.

        Args:
            machine: the GPUs, and how fast they are taken to be.
        """
        return {}
