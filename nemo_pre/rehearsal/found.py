"""What a rehearsed rank is told, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_pre.config.run import RunConfig
from nemo_pre.rehearsal.calls import Log
from nemo_pre.rehearsal.places import Place, rank_of

Lines = list[tuple[str, int]]  # lines of code, each with a number: of times, or of bytes


@dataclass
class Order:
    """What a rehearsed rank is to do.

    Attributes:
        config: the run as :func:`~nemo_pre.rehearsal.shrink.rehearsed_run` made it.
        named_from: bytes of the smallest storage whose line is told.
    """

    config: RunConfig
    place: Place
    named_from: int = 1 << 20

    @property
    def rank(self) -> int:
        return rank_of(self.config.parallel, self.place)

    @property
    def micro_batches(self) -> int:
        trainer = self.config.trainer
        return trainer.global_batch_size // (trainer.micro_batch_size * self.config.parallel.data)


@dataclass
class Found:
    """What a rehearsed rank measured; bytes, and of one step where nothing else is said: the second.

    Attributes:
        state: bytes that stay from step to step: weights, gradients, optimizer, others that stay.
        peaks: of every step.
        held: after every step.
        lines_at_peak: what holds the most at the peak beside the state.
        grown: what is held after the second step and was not after the first, by line.
        kept: what is held after a step beside the state, by line.
        forward_flops: of each chunk's forward pass of the first micro-batch.
        kernels: calls in the forward and backward passes that launch one or more; the optimizer's are not counted.
        waits: for the device, by line. ``copies`` to it. ``both``: calls that are given tensors of both.
        guesses: values that follow from weights and that the host was told nevertheless.
        seconds: of this process, and ``cpu``.
    """

    place: Place
    rank: int
    state: dict[str, int] = field(default_factory=dict)
    peaks: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    peak_line: str = ""
    lines_at_peak: Lines = field(default_factory=list)
    grown: Lines = field(default_factory=list)
    kept: Lines = field(default_factory=list)
    kernels: int = 0
    flops: int = 0
    forward_flops: list[int] = field(default_factory=list)
    waits: Lines = field(default_factory=list)
    copies: Lines = field(default_factory=list)
    both: Lines = field(default_factory=list)
    guesses: Lines = field(default_factory=list)
    log: Log = field(default_factory=Log)
    seconds: float = 0.0
    cpu: float = 0.0
    host_bytes: int = 0

    @property
    def peak(self) -> int:
        """The most of a step with the optimizer's state: the second."""
        return self.peaks[-1]

    @property
    def state_bytes(self) -> int:
        return sum(self.state.values())

    @property
    def growth(self) -> int:
        """Bytes held after the last step and not after the one before."""
        return self.held[-1] - self.held[-2]
