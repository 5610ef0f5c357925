"""Every layout of a number of GPUs: the fastest that fit, and why the others do not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice

from nemo_pre.config.derived import padded_vocab_size
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ClusterConfig, ParallelConfig
from nemo_pre.options import choices_of
from nemo_pre.planner.balance import balanced
from nemo_pre.planner.chunks import layers_problem
from nemo_pre.planner.devices import Device, Efficiency
from nemo_pre.planner.load import Load, largest_load
from nemo_pre.planner.memory import fullest_rank, stages_that_differ, state_memory
from nemo_pre.planner.step_time import StepTime, step_time

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
SHORTEST_SHARD = 4096  # tokens; context parallelism that leaves less is not tried, its kernels would be small


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    config: RunConfig
    memory: int
    time: StepTime


@dataclass
class Refused:
    """Layouts refused for one kind of reason: how many, and the one that came closest."""

    number: int = 0
    nearest: str = ""
    excess: float = float("inf")

    def add(self, sentence: str, excess: float = 0.0) -> None:
        self.number += 1
        if excess < self.excess:
            self.nearest, self.excess = sentence, excess


@dataclass
class Found:
    """The result of a search.

    Attributes:
        best: fastest first.
        fitting: how many fit.
        refused: by reason.
    """

    best: list[Candidate] = field(default_factory=list)
    fitting: int = 0
    refused: dict[str, Refused] = field(default_factory=lambda: defaultdict(Refused))


def search(
    config: RunConfig,
    gpus: int,
    device: Device,
    efficiency: Efficiency,
    check: Callable[[RunConfig], object],
    images_per_row: int | None = None,
    best: int = 5,
) -> Found:
    """The ``best`` layouts of ``gpus`` GPUs for the run; its model, data, batch and objective stay as they are.

    Args:
        check: raises a ValueError of a layout that ``nemo-pre train`` would refuse.

    Raises:
        ValueError: no number of GPUs.
    """
    if gpus < 1:
        raise ValueError(f"cluster.gpus={gpus} must be 1 or more.")
    found, fitting = Found(), []
    for shape in _shapes(config, gpus, device, efficiency, images_per_row, found):
        for candidate in _micro_batches(shape, found):
            fits = _smallest_recomputation(candidate, device, efficiency, images_per_row, found)
            if fits is not None:
                fitting.append(fits)
    fitting.sort(key=lambda candidate: (round(candidate.time.seconds, 9), -candidate.config.trainer.micro_batch_size))
    found.fitting = len(fitting)
    accepted = islice((candidate for candidate in fitting if _accepted(candidate, check, found)), 2 * best)
    found.best = [_exactly(candidate, device, efficiency, images_per_row) for candidate in accepted]
    found.best = sorted(found.best, key=lambda candidate: candidate.time.seconds)[:best]
    return found


def describe_layout(config: RunConfig) -> str:
    layout = config.parallel
    chunks = f" x VPP{layout.virtual_pipeline}" if layout.virtual_pipeline else ""
    chunks += f" ({describe_layers(layout.pipeline_layers)} layers)" if layout.pipeline_layers else ""
    sequence = "+SP" if layout.sequence and layout.tensor > 1 else ""
    return (
        f"TP{layout.tensor}{sequence} x PP{layout.pipeline}{chunks} x CP{layout.context} x DP{layout.data}, "
        f"micro-batch {config.trainer.micro_batch_size}, recompute {layout.recompute}"
    )


def layout_words(config: RunConfig) -> list[str]:
    """The options of ``nemo-pre train`` that give the run this layout."""
    layout = config.parallel
    values = {
        "tensor": layout.tensor,
        "sequence": str(layout.sequence).lower(),
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline or "null",
        "pipeline_layers": "null" if layout.pipeline_layers is None else _listed(layout.pipeline_layers),
        "context": layout.context,
        "data": layout.data,
        "recompute": layout.recompute,
        "recompute_num_layers": layout.recompute_num_layers,
    }
    words = [f"parallel.{name}={value}" for name, value in values.items()]
    return [*words, f"trainer.micro_batch_size={config.trainer.micro_batch_size}"]


def _listed(numbers: Sequence[int]) -> str:
    return "[" + ",".join(map(str, numbers)) + "]"


def describe_layers(sizes: Sequence[int]) -> str:
    """The sizes as text, with equal neighbours together: 3, 5x6, 4."""
    runs = [(size, len(list(alike))) for size, alike in groupby(sizes)]
    return ", ".join(f"{size}x{number}" if number > 1 else str(size) for size, number in runs)


def indivisible(config: RunConfig) -> str | None:
    """Why the model, or the batch, cannot be cut as the layout wants; None: it can."""
    language, layout, trainer = config.model.language, config.parallel, config.trainer
    for what, size in (
        ("attention heads", language.num_attention_heads),
        ("query groups", language.num_query_groups),
        ("MLP columns", language.ffn_hidden_size),
        ("rows of the vocabulary", padded_vocab_size(language.vocab_size)),
    ):
        if size % layout.tensor:
            return f"TP{layout.tensor} does not divide {size} {what}"
    problem = layers_problem(config)
    if problem is not None:
        return problem.rstrip(".")
    factor = (2 * layout.context if layout.context > 1 else 1) * (layout.tensor if layout.sequence else 1)
    if config.data.sequence_length % factor:
        return f"{factor} shards do not divide a sequence of {config.data.sequence_length} tokens"
    if trainer.global_batch_size % (trainer.micro_batch_size * layout.data):
        return (
            f"{trainer.micro_batch_size} samples x DP{layout.data} do not divide a batch of "
            f"{trainer.global_batch_size}"
        )
    micro_batches = trainer.global_batch_size // (trainer.micro_batch_size * layout.data)
    if layout.virtual_pipeline and micro_batches % layout.pipeline:
        return f"{micro_batches} micro-batches cannot be interleaved over PP{layout.pipeline}"
    return None


# --- the candidates -------------------------------------------------------------------------------------------------


def _shapes(
    config: RunConfig, gpus: int, device: Device, efficiency: Efficiency, images_per_row: int | None, found: Found
) -> Iterator[RunConfig]:
    """Every shape of a layout: tensor parallelism within a server, then pipelines and virtual stages, then context;
    replicas take the rest. The layers of a pipeline are dealt out so that its stages are busy alike."""
    language, length = config.model.language, config.data.sequence_length
    contexts = {1} | {size for size in (2, 4, 8) if length // size >= SHORTEST_SHARD} | {config.parallel.context}
    for tensor in _divisors(min(device.per_node, gpus)):
        for context in sorted(contexts):
            for pipeline in _divisors(gpus):
                if gpus % (tensor * context * pipeline) or pipeline > language.num_layers:
                    continue
                for virtual in (1, *_divisors(language.num_layers // pipeline)[1:]) if pipeline > 1 else (1,):
                    parallel = replace(
                        config.parallel,
                        tensor=tensor,
                        sequence=tensor > 1,
                        context=context,
                        pipeline=pipeline,
                        virtual_pipeline=virtual if virtual > 1 else None,
                        pipeline_layers=None,
                        data=gpus // (tensor * context * pipeline),
                        recompute="none",
                        recompute_num_layers=1,
                    )
                    trainer = replace(config.trainer, micro_batch_size=1)
                    shape = replace(config, parallel=parallel, trainer=trainer)
                    shape = balanced(shape, largest_load(shape, images_per_row), device, efficiency)
                    reason = indivisible(shape)
                    if reason is None:
                        yield shape
                    else:
                        found.refused["not divisible"].add(reason)


def _micro_batches(shape: RunConfig, found: Found) -> Iterator[RunConfig]:
    for size in MICRO_BATCH_SIZES:
        candidate = replace(shape, trainer=replace(shape.trainer, micro_batch_size=size))
        reason = indivisible(candidate)
        if reason is None:
            yield candidate
        else:
            found.refused["not divisible"].add(reason)


def _smallest_recomputation(
    candidate: RunConfig, device: Device, efficiency: Efficiency, images_per_row: int | None, found: Found
) -> Candidate | None:
    """The candidate with as little recomputation as fits."""
    available = device.memory * efficiency.memory
    state = max(sum(state_memory(candidate, stage).values()) for stage in stages_that_differ(candidate))
    if state > available:
        _does_not_fit(found, candidate, state - available, "weights, gradients and optimizer alone do not fit")
        return None
    load = largest_load(candidate, images_per_row)
    size = 0
    for recompute in choices_of(ParallelConfig, "recompute"):  # from the fastest to the smallest
        tried = replace(candidate, parallel=replace(candidate.parallel, recompute=recompute))
        size = fullest_rank(tried, load, fused=True)[1].total
        if size <= available:
            return Candidate(tried, size, step_time(tried, load, device, efficiency, exact=False))
    _does_not_fit(found, tried, size - available, "too much memory, even with full recomputation")
    return None


def _does_not_fit(found: Found, config: RunConfig, excess: float, kind: str) -> None:
    found.refused[kind].add(f"{describe_layout(config)}: does not fit by {excess / 1e9:.1f} GB", excess)


def _accepted(candidate: Candidate, check: Callable[[RunConfig], object], found: Found) -> bool:
    """Whether ``nemo-pre train`` would take the layout, wherever it is: it has rules of its own, such as FP8's and
    objectives'."""
    try:
        check(replace(candidate.config, cluster=ClusterConfig(), platform="gpu", dry_run=True))
    except ValueError as error:
        found.refused["refused by nemo-pre train"].add(f"{describe_layout(candidate.config)}: {error}".rstrip("."))
        found.fitting -= 1
        return False
    return True


def _exactly(candidate: Candidate, device: Device, efficiency: Efficiency, images_per_row: int | None) -> Candidate:
    load: Load = largest_load(candidate.config, images_per_row)
    return replace(candidate, time=step_time(candidate.config, load, device, efficiency))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
