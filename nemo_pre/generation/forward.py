"""Running the model outside training, in whatever layout it is trained, through Megatron's forward-only schedule.

Each data-parallel rank works on the sequences it is given; all ranks of its replica (tensor, pipeline, context) must
be given the same and call together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.neva.fp8 import without_fp8
from nemo_pre.neva.model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, MCoreVisualNevaModel, unobserved
from nemo_pre.objectives.scale import StepPlan
from nemo_pre.parallel.micro_batch import MicroBatch
from nemo_pre.parallel.sequence_layout import Grid, combined_lengths, local_positions, sequence_layout

PADDING = 0  # any id will do: attention is causal and padding is on the right


@dataclass(frozen=True)
class TokenSequence:
    """One prompt, or one prompt with its answer: ``tokens`` int64 [t] with -200 for an image, ``images`` float32
    [n, 3, H, W] or None, and for :func:`answer_loss` ``labels`` int64 [t], shifted, -100 where nothing counts. With
    native resolution ``images`` is [visual tokens, patches, pixels], and ``grids`` has each image's rows and columns.
    """

    tokens: Tensor
    images: Tensor | None = None
    labels: Tensor | None = None
    grids: list[Grid] | None = None


def answer_loss(
    chunks: list[MCoreVisualNevaModel], sequences: Sequence[TokenSequence], micro_batch_size: int = 8
) -> tuple[float, int]:
    """Sum of the cross-entropy (nats) over the sequences' labels, and how many labels there are; on every rank.

    Sequences longer than the model's longest are cut.
    """
    if not sequences:
        return 0.0, 0
    from megatron.core import parallel_state as ps

    def sums(batch: Batch, losses_and_mask: Tensor) -> Tensor:
        per_row = losses_and_mask.double().sum(dim=2)  # [2, B]
        if ps.get_context_parallel_world_size() > 1:
            dist.all_reduce(per_row, group=ps.get_context_parallel_group())
        return per_row.transpose(0, 1)

    with evaluating(chunks):
        batches = make_batches(chunks, sequences, micro_batch_size)
        length = batches[0].micro_batch.layout.sequence_length
        rows = run(chunks, batches, length, run_whole, sums, torch.empty(0, 2, dtype=torch.float64))[: len(sequences)]
    loss_sum, count = rows.sum(dim=0).tolist()
    return loss_sum, round(count)


# --- one forward pass over many sequences -----------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A micro-batch of sequences: text ``[B, T]`` padded on the right, and its place in the combined sequence."""

    tokens: Tensor
    labels: Tensor | None
    images: list[Tensor]
    last_position: Tensor  # [B] of each sequence's last token in the combined sequence
    micro_batch: MicroBatch


def last_logits(batch: Batch, logits: Tensor) -> Tensor:
    """Float32 logits ``[B, padded vocabulary]`` after each sequence's last token, from this rank's ``[B, S, V]``:
    a part of the vocabulary under tensor parallelism, a part of the positions under context parallelism."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    # The output layer has gathered what sequence parallelism scatters.
    held = local_positions(
        batch.micro_batch.layout.sequence_length,
        tp_size=1,
        tp_rank=0,
        cp_size=ps.get_context_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
    )
    here = held[None, :] == batch.last_position[:, None]
    row, index = torch.arange(len(here)), here.int().argmax(dim=1)
    own = logits[row.to(logits.device), index.to(logits.device)].float()
    own = gather_from_tensor_model_parallel_region(own)
    if ps.get_context_parallel_world_size() > 1:
        own = own.masked_fill(~here.any(dim=1, keepdim=True).to(own.device), float("-inf"))
        dist.all_reduce(own, op=dist.ReduceOp.MAX, group=ps.get_context_parallel_group())
    return own


def only_logits(logits: Tensor) -> Tensor:
    """Float32 logits ``[B, padded vocabulary]`` from this rank's ``[B, 1, V]``, of sequences that are not cut."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    return gather_from_tensor_model_parallel_region(logits[:, 0].float())


def run(
    chunks: list[MCoreVisualNevaModel],
    batches: Sequence[Batch],
    length: int,
    forward: Callable[[MCoreVisualNevaModel, Batch], Any],
    collect: Callable[[Batch, Tensor], Tensor],
    nothing: Tensor,
) -> Tensor:
    """Run every micro-batch once through the pipeline.

    Args:
        length: tokens of the rows of hidden states that pass between stages.
        forward: runs a chunk on a micro-batch.
        collect: turns the last stage's output into rows ``[B, k]``.
        nothing: ``[0, k]``, tells their width and type.

    Returns:
        The rows of all micro-batches, on every rank.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(data: Iterator[Batch], chunk: MCoreVisualNevaModel) -> tuple[Any, Callable[..., Tensor]]:
        batch = next(data)
        output = forward(chunk, batch)
        if isinstance(output, tuple):
            losses, mask = output
            output = torch.stack([losses * mask, mask])

        def rows(output: Tensor, non_loss_data: bool) -> Tensor:
            return collect(batch, output)

        return output, rows

    interleaved = len(chunks) > 1
    data = [iter(batches) for _ in chunks]
    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data if interleaved else data[0],
        model=chunks if interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=len(batches[0].tokens),
        forward_only=True,
        collect_non_loss_data=True,
    )
    shape = (sum(len(batch.tokens) for batch in batches), nothing.shape[1])
    device = torch.cuda.current_device()
    result = torch.cat(collected) if collected else torch.empty(shape, dtype=nothing.dtype, device=device)
    if ps.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            result,
            src=ps.get_pipeline_model_parallel_last_rank(),
            group=ps.get_pipeline_model_parallel_group(),
        )
    return result


def run_whole(chunk: MCoreVisualNevaModel, batch: Batch) -> Any:
    """A chunk's output for whole sequences."""
    return chunk(**_inputs(chunk, batch))


def run_to_states(chunk: MCoreVisualNevaModel, batch: Batch) -> Any:
    """A chunk's output for whole sequences; of the last the states ``[S, B, d]`` that the output layer would see."""
    with chunk.without_output_layer() if chunk.post_process else nullcontext():
        return chunk(**_inputs(chunk, batch))


def _inputs(chunk: MCoreVisualNevaModel, batch: Batch) -> dict[str, Any]:
    """What this chunk reads, on the device."""
    device = torch.cuda.current_device()
    inputs: dict[str, Any] = {"input_ids": batch.tokens.to(device), "micro_batch": batch.micro_batch}
    if chunk.pre_process:
        inputs["position_ids"] = torch.arange(batch.tokens.shape[1], device=device).expand(batch.tokens.shape)
        inputs["images"] = torch.cat(batch.images).to(device) if batch.images else None
    if chunk.post_process and batch.labels is not None:
        inputs["labels"] = batch.labels.to(device)
        inputs["loss_mask"] = (inputs["labels"] != IGNORE_INDEX).float()
    return inputs


def make_batches(
    chunks: list[MCoreVisualNevaModel], sequences: Sequence[TokenSequence], micro_batch_size: int
) -> list[Batch]:
    """Micro-batches of one size and one length, as a pipeline needs them; the first sequence fills up the last."""
    from megatron.core import parallel_state as ps

    stages = ps.get_pipeline_model_parallel_world_size()
    rows = min(micro_batch_size, -(-len(sequences) // stages))  # rather fill the pipeline than a micro-batch
    multiple = rows * (stages if len(chunks) > 1 else 1)  # what the interleaved schedule wants
    filled = [*sequences, *[sequences[0]] * (-len(sequences) % multiple)]
    chunk = chunks[0]
    length = chunk.padded_length(max(combined_length(sequence, chunk) for sequence in sequences))
    text_length = max(len(sequence.tokens) for sequence in sequences)
    groups = [filled[start : start + rows] for start in range(0, len(filled), rows)]
    plan = StepPlan(len(groups), length)
    return [_batch(chunk, group, text_length, plan, index) for index, group in enumerate(groups)]


def _batch(
    chunk: MCoreVisualNevaModel, sequences: list[TokenSequence], text_length: int, plan: StepPlan, index: int
) -> Batch:
    tokens = torch.full((len(sequences), text_length), PADDING, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX) if sequences[0].labels is not None else None
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence.tokens)] = sequence.tokens
        if labels is not None:
            assert sequence.labels is not None
            labels[row, : len(sequence.labels)] = sequence.labels
    images = [sequence.images for sequence in sequences if sequence.images is not None]
    tiles = [image for sequence in sequences for image in _image_tiles(sequence, chunk)]
    layout = sequence_layout(tokens, tiles, IMAGE_TOKEN_INDEX, plan.sequence_length)
    last = torch.tensor([combined_length(sequence, chunk) - 1 for sequence in sequences])
    return Batch(tokens, labels, images, last, MicroBatch(index, plan, layout))


def combined_length(sequence: TokenSequence, chunk: MCoreVisualNevaModel) -> int:
    """Tokens of the sequence with its images expanded."""
    return int(combined_lengths(sequence.tokens[None], _image_tiles(sequence, chunk), IMAGE_TOKEN_INDEX))


def _image_tiles(sequence: TokenSequence, chunk: MCoreVisualNevaModel) -> list[list[Grid]]:
    return [] if sequence.images is None else chunk.image_tiles([1] * len(sequence.images), sequence.grids)


@contextmanager
def evaluating(chunks: list[MCoreVisualNevaModel]) -> Iterator[None]:
    """Evaluation mode without gradients, and the training mode it found restored; objectives neither see nor send
    anything, and nothing is computed in FP8."""
    training = [chunk.training for chunk in chunks]
    try:
        configs = [chunk.language_model.config for chunk in chunks]
        with torch.no_grad(), unobserved(chunks), without_fp8(configs):
            for chunk in chunks:
                chunk.eval()
            yield
    finally:
        for chunk, mode in zip(chunks, training, strict=True):
            chunk.train(mode)
