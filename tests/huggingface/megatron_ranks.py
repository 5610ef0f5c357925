"""The rank's side of the Hugging Face tests: an imported model is loaded in a layout, and asked."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class Question:
    """``tokens`` int64 [t] with -200 for an image; ``pixels`` float32 [n, 3, H, W] or None; with native resolution
    [visual tokens, patches, pixels], and ``grids`` has the images' rows and columns."""

    tokens: Tensor
    pixels: Tensor | None
    grids: list[tuple[int, int]] | None = None


@dataclass
class Told:
    """``logits``: float32 ``[S, vocabulary]`` of each question, image expanded; on ranks of the last stage."""

    logits: list[Tensor]
    cached: list[list[int]]
    uncached: list[list[int]]


def ask(
    checkpoint: str, parallel: dict[str, int], questions: list[Question], new_tokens: int, vocabulary: int
) -> Told:
    """What the model says, with the key-value cache and without."""
    import torch
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_pre.generation import TokenSequence, generate
    from nemo_pre.generation.forward import evaluating, make_batches, run, run_whole
    from nemo_pre.inference import inference_run, load_chunks

    run_ = inference_run(checkpoint, tempfile.mkdtemp(), platform="cpu", **parallel)
    chunks = load_chunks(run_)
    sequences = [TokenSequence(question.tokens, question.pixels, grids=question.grids) for question in questions]
    logits: list[Tensor] = []

    def keep(batch: Any, output: Tensor) -> Tensor:
        whole = gather_from_tensor_model_parallel_region(output.float())
        last = batch.last_position.tolist()
        logits.extend(row[: end + 1, :vocabulary].clone() for row, end in zip(whole, last, strict=True))
        return torch.zeros(len(whole), 1)

    with torch.no_grad(), evaluating(chunks):
        batches = make_batches(chunks, sequences, 2)
        length = batches[0].micro_batch.layout.sequence_length
        run(chunks, batches, length, run_whole, keep, torch.empty(0, 1))
    answers = [
        generate(chunks, sequences, new_tokens, stop_token=-1, vocab_size=vocabulary, micro_batch_size=2, cache=cache)
        for cache in (True, False)
    ]
    return Told(logits[: len(questions)], *answers)


def save_again(checkpoint: str, parallel: dict[str, int], out: str) -> dict[str, Tensor]:
    """Load a checkpoint and save it from this layout; returns this rank's parameters."""
    from megatron.core import dist_checkpointing

    from nemo_pre.inference import inference_run, load_chunks

    chunks = load_chunks(inference_run(checkpoint, tempfile.mkdtemp(), platform="cpu", **parallel))
    weights = Path(out) / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    state = {}
    for chunk in chunks:
        state |= chunk.sharded_state_dict(prefix="module.")
    dist_checkpointing.save(state, str(weights))
    shutil.copy(Path(checkpoint) / "config.yaml", out)
    return {name: parameter.detach().clone() for chunk in chunks for name, parameter in chunk.named_parameters()}
